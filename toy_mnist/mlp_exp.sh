#!/bin/sh
# The toy experiment: clean, noisy and clean-then-noisy encoders, their linear probes, a table and plots.
#
#   sh mlp_exp.sh                       one seed (about 4 minutes on 2 cores); finished work is never repeated
#   sh mlp_exp.sh 5 --data DIR          five seeds, MNIST from a folder of idx files (plain or .gz)
#   sh mlp_exp.sh 1 --sweep             switch epochs 0..50 x noise levels 0.1..0.8
#
# Results: runs/toy_mnist at the top of the project, or --output DIR. All options: sh mlp_exp.sh --help
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
seeds=1
case "${1:-}" in
    '' | -*) ;;
    *) seeds=$1; shift ;;
esac
if [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
elif [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
else
    python=$(command -v python || command -v python3) || { echo "error: no python found; activate an environment" >&2; exit 2; }
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m toy_mnist.experiment \
    --seeds "$seeds" --output "$root/runs/toy_mnist" "$@"
