#!/bin/sh
# Stage 1: a noisy copy of the data for each noise, noisy_<name>-<noise> beside it.
# Needed only where data.storage is disk; else noise is added while loading, the same bytes without the disk space.
#   sh exps/1_generate_noise.sh NOISE... --data DIR
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline 1_generate_noise "$@"
