#!/bin/sh
# Stage 5: DINOv2 by each method under each noise; runs lie in <output>/<noise>/<method>, the ceiling in <output>/clean.
# The n2n run is the denoised run of nc and nct, trained once and shared by the three.
#   sh exps/5_pretrain.sh NOISE... --data DIR --scale NAME --method NAME
[ "${exps_options:-}" = read ] || . "$(dirname "$0")/common.sh"

pretrain() { # NOISE METHOD key=value...
    folder=$(run_folder "$1" "$2") noise=$1 method=$2
    shift 2
    set -- "$scale" "$method" "data.root=$data" "output_dir=$folder" ${seed:+"seed=$seed"} "$@"
    eval "set -- \"\$@\" $overrides"
    if [ "$gpus" -gt 1 ]; then
        set -- "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m dinov2.train "$@"
    else
        set -- "$PYTHON" -m dinov2.train "$@"
    fi
    configs="$(tree_state "$data")
$(sums "$scale_file" dinov2/configs/default.yaml "dinov2/configs/$method.yaml")
$(sums "$(denoised_tree "$noise")/manifest.json")"
    once "$output/.done/pretrain-$noise-$method$(of_seed)" "$configs" "$@"
}

pretrain_all() { # of one seed
    for noise in $noises; do
        for method in $(methods_under "$noise"); do
            pretrain "$noise" "$method" "noise=$noise" "data.denoised_root=$(denoised_tree "$noise")" \
                "data.noisy_root=$(noisy_tree "$noise")" "curriculum.denoised_dir=$(run_folder "$noise" n2n)"
        done
    done
    if with_ceiling; then
        pretrain none clean
    fi
}

case "$methods " in
    *"nct "*)
        for noise in $noises; do
            case $(methods_under "$noise") in
                *nct) ;;
                *) echo "nct is left out: no lambda for $noise; give anchor.weights.$noise=NUMBER" ;;
            esac
        done ;;
esac
for seed in $seeds; do
    [ "$seed" != default ] || seed=''
    pretrain_all
done
