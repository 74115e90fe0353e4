#!/bin/sh
# Stage 3: a denoised copy of the data for each noise, noisy_<name>-<noise>-denoised beside it.
#   sh exps/3_denoise.sh NOISE... --data DIR --scale NAME
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline 3_denoise "$@"
