#!/bin/sh
# Stage 2: Neighbor2Neighbor on the noisy images of each noise; writes <output>/<noise>/denoiser/unet.pth.
#   sh exps/2_train_denoiser.sh NOISE... --data DIR --scale NAME
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline 2_train_denoiser "$@"
