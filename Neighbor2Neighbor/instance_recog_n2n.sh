#!/bin/sh
# Denoise Revisited Oxford and Paris under each noise, for the retrieval with N2N + DINOv2.
#
#   sh instance_recog_n2n.sh --data DIR [NOISE...] [options] [-- options of the denoising]
#
#   NOISE          gauss255, shot3, ...; all nine without
#   --data DIR     folder with datasets/{roxford5k,rparis6k}/jpg, or with {roxford5k,rparis6k}/jpg [.]
#   --models DIR   folder of the denoisers that linear_probe_n2n.sh trained, DIR/<noise>/denoiser/unet.pth
#                  [runs/imagenet100 in the project]
#   --gpus N       processes, one per GPU [1]
#   --dry-run      print the commands, run nothing
#
# The copies are noisy_jpg-<noise>-denoised/ beside each jpg/, where the evaluation looks for them. Finished ones are skipped.
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline instance_recog_n2n "$@"
