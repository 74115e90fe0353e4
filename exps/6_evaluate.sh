#!/bin/sh
# Stage 6: the frozen backbones on the images of their evaluation view; rows go to results.jsonl in each run's folder.
# Then, once for each noise and view, the floors: what an untrained backbone and the raw pixels reach, in <output>/floors.
#   sh exps/6_evaluate.sh NOISE... --data DIR --scale NAME --method NAME --eval linear --checkpoints all
[ "${exps_options:-}" = read ] || . "$(dirname "$0")/common.sh"

evaluate() { # NOISE METHOD
    folder=$(run_folder "$1" "$2") noise=$1 method=$2
    if [ -z "$dry" ] && [ ! -e "$folder/config.yaml" ]; then
        echo "$folder is left out: it was not pretrained"
        return
    fi
    for name in $evals; do
        set -- "run=$folder" "checkpoints=$checkpoints"
        eval "set -- \"\$@\" $eval_overrides"
        once "$output/.done/$name-$noise-$method$(of_seed)" \
            "$(tree_state "$data"; sums "$folder"/config.yaml "$folder"/checkpoints/*/COMPLETE)" "$PYTHON" -m "dinov2.eval.$name" "$@"
    done
}

floors() { # NOISE METHOD...: of each view that the methods are evaluated on, from the first pretrained one's settings.
    [ -n "$(floor_evals)" ] || return 0
    noise=$1 seen=''
    shift
    for method; do
        folder=$(run_folder "$noise" "$method") view=$(view_of "$method")
        if [ -n "$dry" ] || [ -e "$folder/config.yaml" ]; then
            case $seen in *"$view"*) continue ;; esac
            seen="$seen $view"
            for_floors "$folder" once "$output/.done/floors-$noise-$view" \
                "$(sums "$folder/config.yaml" ${floor:+"$floor"})" "$PYTHON" -m dinov2.eval.floors
        fi
    done
}

for seed in $seeds; do
    [ "$seed" != default ] || seed=''
    for noise in $noises; do
        for method in $(methods_under "$noise"); do
            evaluate "$noise" "$method"
        done
    done
    if with_ceiling; then
        evaluate none clean
    fi
done
seed=$(first_seed)
for noise in $noises; do
    # shellcheck disable=SC2046  # a list of names
    floors "$noise" $(methods_under "$noise")
done
if with_ceiling; then
    floors none clean
fi
