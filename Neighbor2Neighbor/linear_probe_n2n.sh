#!/bin/sh
# Train Neighbor2Neighbor under each noise and write the denoised copies that N2N + DINOv2, NC and NCT are trained on.
#
#   sh linear_probe_n2n.sh [NOISE...] [options] [-- options of the training]
#
#   NOISE          gauss255, shot3, ...; all nine without
#   --data DIR     the clean images [mini-imagenet]: a name is looked for here, in the folder above,
#                  and in the project
#   --models DIR   folder of the trained denoisers, DIR/<noise>/denoiser/unet.pth [runs/imagenet100 in the project]
#   --gpus N       processes, one per GPU [1]
#   --dry-run      print the commands, run nothing
#
# Where noisy_<data>-<noise>/ is there (utils/generate_noise.py), it is read; else the clean images, with the same noise
# added while loading. The copy is noisy_<data>-<noise>-denoised/, beside what was read. Whatever is finished is skipped.
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline linear_probe_n2n "$@"
