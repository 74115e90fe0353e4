#!/bin/sh
# Stage 3: a denoised copy of the data for each noise, noisy_<name>-<noise>-denoised beside it.
#   sh exps/3_denoise.sh NOISE... --data DIR --scale NAME
[ "${exps_options:-}" = read ] || . "$(dirname "$0")/common.sh"

for noise in $noises; do
    model=$output/$noise/denoiser/unet.pth
    once "$output/.done/denoise-$noise" "$(tree_state "$data"; sums "$model")" "$PYTHON" -m Neighbor2Neighbor.denoise \
        --model "$model" --data "$data" --noise "$noise" --output "$(denoised_tree "$noise")" \
        ${channels:+--format npy} ${max_pixels:+--max-pixels "$max_pixels"}
done
