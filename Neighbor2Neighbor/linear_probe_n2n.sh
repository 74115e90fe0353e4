#!/bin/sh
# Train Neighbor2Neighbor under each noise and write the denoised copies that N2N + DINOv2, NC and NCT are trained on.
#
#   sh linear_probe_n2n.sh [NOISE...] [options] [-- options of the training]
#
#   NOISE          gauss255, shot3, ...; all nine without
#   --data DIR     the clean images [mini-imagenet]: a name is looked for here, in the folder above,
#                  and in the project
#   --models DIR   folder of the trained denoisers, DIR/<noise>/denoiser/unet.pth [runs/imagenet100 in the project]
#   --gpus N       processes, one a GPU [1]
#   --dry-run      print the commands, run nothing
#
# Where noisy_<data>-<noise>/ is there (utils/generate_noise.py), it is read; else the clean images, with the same noise
# added while loading. The copy is noisy_<data>-<noise>-denoised/, beside what was read. Whatever is finished is skipped.
set -eu
. "$(dirname "$0")/common.sh"

name=$(basename "${data:-mini-imagenet}")
models=$(absolute "${models:-$root/runs/imagenet100}")

# Prints the folder called $1 below one of the folders $2...
find_below() {
    wanted=$1
    shift
    for place; do
        if [ -d "$place/$wanted" ]; then
            (cd "$place/$wanted" && pwd)
            return
        fi
    done
    return 1
}

# The folder called $1, where it may lie: the published steps move the noisy copies into this script's folder and back.
find_tree() {
    case $data in
        */*) find_below "$1" "$(dirname "$(absolute "$data")")" ;;
        *) find_below "$1" "$here" "$here/.." "$root" "$root/Neighbor2Neighbor" ;;
    esac
}

for noise in $noises; do
    if tree=$(find_tree "noisy_$name-$noise"); then
        added=none output=$tree-denoised
    elif tree=$(find_tree "$name"); then
        added=$noise output=$(dirname "$tree")/noisy_$name-$noise-denoised
    else
        echo "error: neither $name nor noisy_$name-$noise is here or in the folder above; name the images by --data DIR" >&2
        exit 2
    fi
    module Neighbor2Neighbor.train --config Neighbor2Neighbor/published.yaml --data "$tree" --noise "$added" \
        --output "$models/$noise/denoiser" "$@"
    module Neighbor2Neighbor.denoise --model "$models/$noise/denoiser/unet.pth" --data "$tree" --noise "$added" \
        --output "$output"
done
