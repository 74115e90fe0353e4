#!/bin/sh
# Stage 1: a noisy copy of the data for each noise, noisy_<name>-<noise> beside it.
# Needed only where data.storage is disk; else noise is added while loading, the same bytes without the disk space.
#   sh exps/1_generate_noise.sh NOISE... --data DIR
[ "${exps_options:-}" = read ] || . "$(dirname "$0")/common.sh"

for noise in $noises; do
    [ "$noise" != none ] || continue
    target=$(noisy_tree "$noise")
    once "$output/.done/noise-$noise" "$(tree_state "$data")" \
        "$PYTHON" utils/generate_noise.py --source "$data" --noise "$noise" --output-root "$(dirname "$target")" \
        ${channels:+--channels "$channels" --format npy} ${max_pixels:+--max-pixels "$max_pixels"}
done
