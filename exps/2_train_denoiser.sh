#!/bin/sh
# Stage 2: Neighbor2Neighbor on the noisy images of each noise; writes <output>/<noise>/denoiser/unet.pth.
#   sh exps/2_train_denoiser.sh NOISE... --data DIR --scale NAME
[ "${exps_options:-}" = read ] || . "$(dirname "$0")/common.sh"

# The published schedules, and what fits images too small for them. So short a training starts from full-sized weights: the
# published ones, a tenth of that, take some hundred steps to come to life.
case $scale_name in
    quickstart) set -- --epochs 10 --batch-size 16 --crop 32 --depth 3 --init-scale 1 ;;
    imagenette) set -- --epochs 8 --batch-size 16 --crop 96 --depth 4 --init-scale 1 ;;
    mstar) set -- --epochs 20 --batch-size 16 --crop 64 --depth 3 --init-scale 1 --subsample 2 --values log=[1,255] ;;
    imagenet1k) set -- --config Neighbor2Neighbor/imagenet1k.yaml ;;
    *) set -- --config Neighbor2Neighbor/published.yaml ;;
esac
for noise in $noises; do
    once "$output/.done/denoiser-$noise" "$(tree_state "$data"; sums Neighbor2Neighbor/*.yaml)" "$PYTHON" -m Neighbor2Neighbor.train --data "$data" \
        --noise "$noise" --output "$output/$noise/denoiser" "$@" ${steps:+--steps "$steps"} \
        ${channels:+--channels "$channels"} ${max_pixels:+--max-pixels "$max_pixels"}
done
