#!/bin/sh
# Stage 4: file lists of the data and its copies, built ahead. Optional: runs build a missing one themselves.
#   sh exps/4_metadata.sh NOISE... --data DIR
[ "${exps_options:-}" = read ] || . "$(dirname "$0")/common.sh"

set -- "$data"
for noise in $noises; do
    for folder in "$(noisy_tree "$noise")" "$(denoised_tree "$noise")"; do
        if [ -d "$folder" ]; then
            set -- "$@" "$folder"
        fi
    done
done
once "$output/.done/metadata" "$(tree_state "$@")" "$PYTHON" process_metadata.py "$@"
