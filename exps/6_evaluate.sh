#!/bin/sh
# Stage 6: the frozen backbones on the images of their evaluation view; rows go to results.jsonl in each run's folder.
# Then, once for each noise and view, the floors: what an untrained backbone and the raw pixels reach, in <output>/floors.
#   sh exps/6_evaluate.sh NOISE... --data DIR --scale NAME --method NAME --eval linear --checkpoints all
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline 6_evaluate "$@"
