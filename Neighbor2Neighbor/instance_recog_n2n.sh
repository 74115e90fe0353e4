#!/bin/sh
# Denoise Revisited Oxford and Paris under each noise, for the retrieval with N2N + DINOv2.
#
#   sh instance_recog_n2n.sh --data DIR [NOISE...] [options] [-- options of the denoising]
#
#   NOISE          gauss255, shot3, ...; all nine without
#   --data DIR     folder with datasets/{roxford5k,rparis6k}/jpg, or with {roxford5k,rparis6k}/jpg [.]
#   --models DIR   folder of the denoisers that linear_probe_n2n.sh trained, DIR/<noise>/denoiser/unet.pth
#                  [runs/imagenet100 in the project]
#   --gpus N       processes, one a GPU [1]
#   --dry-run      print the commands, run nothing
#
# The copies are noisy_jpg-<noise>-denoised/ beside each jpg/, where the evaluation looks for them. Finished ones are skipped.
set -eu
. "$(dirname "$0")/common.sh"

data=$(absolute "${data:-.}")
models=$(absolute "${models:-$root/runs/imagenet100}")
[ ! -d "$data/datasets" ] || data=$data/datasets
for dataset in roxford5k rparis6k; do
    if [ ! -d "$data/$dataset/jpg" ]; then
        echo "error: $data/$dataset/jpg is missing; name the folder of both sets by --data DIR" >&2
        exit 2
    fi
done

for noise in $noises; do
    for dataset in roxford5k rparis6k; do
        module Neighbor2Neighbor.denoise --model "$models/$noise/denoiser/unet.pth" --data "$data/$dataset/jpg" \
            --noise "$noise" "$@"
    done
done
