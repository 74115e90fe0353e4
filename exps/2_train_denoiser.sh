#!/bin/sh
# Stage 2: Neighbor2Neighbor on the noisy images of each noise; writes <output>/<noise>/denoiser/unet.pth.
#   sh exps/2_train_denoiser.sh NOISE... --data DIR --scale NAME
[ "${exps_options:-}" = read ] || . "$(dirname "$0")/common.sh"

# What the published schedule (100 epochs, batches of 4 crops of 256 pixels, depth 5) becomes at the other scales.
case $scale_name in
    quickstart) set -- --epochs 12 --batch-size 16 --crop 32 --depth 3 ;;
    imagenette) set -- --epochs 20 --batch-size 16 --crop 96 --depth 4 ;;
    imagenet1k) set -- --batch-size 8 --subset 100000 ;;
    *) set -- ;;
esac
for noise in $noises; do
    once "$output/.done/denoiser-$noise" "$(data_state)" "$PYTHON" -m Neighbor2Neighbor.train --data "$data" --noise "$noise" \
        --output "$output/$noise/denoiser" "$@" ${steps:+--steps "$steps"}
done
