#!/bin/sh
# Stage 6: the frozen backbones on the images of their evaluation view; rows go to results.jsonl in each run's folder.
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
        once "$output/.done/$name-$noise-$method" "$(sums "$folder"/config.yaml "$folder"/checkpoints/*/COMPLETE)" \
            "$PYTHON" -m "dinov2.eval.$name" "$@"
    done
}

for noise in $noises; do
    for method in $(methods_under "$noise"); do
        evaluate "$noise" "$method"
    done
done
if with_ceiling; then
    evaluate none clean
fi
