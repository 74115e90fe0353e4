#!/bin/sh
# Stage 5: DINOv2 by each method under each noise; runs lie in <output>/<noise>/<method>, the oracle in <output>/clean.
# The n2n run is the denoised run of nc and nct, trained once and shared by the three.
#   sh exps/5_pretrain.sh NOISE... --data DIR --scale NAME --method NAME
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline 5_pretrain "$@"
