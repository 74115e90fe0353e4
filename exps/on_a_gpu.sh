#!/bin/bash
# Tests, times and trains this code in half an hour on a GPU, what is worth most first, resumable. See exps/on_a_gpu.py.
#   bash exps/on_a_gpu.sh --pack imagenette96        here: images and missing packages as small files in runs/pack
#   bash exps/on_a_gpu.sh --output results           there: everything, at most 30 minutes; call it again to go on
#   bash exps/on_a_gpu.sh --device cpu --trial       every part in small, to see that it ends well
set -eu
from=$(pwd)
cd "$(dirname "$0")/.."
for python in python3 .venv/bin/python; do # what it needs itself is PyTorch; the packages that are missing come with the pack
    if "$python" -c 'import sys, torch; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" exps/on_a_gpu.py --from "$from" "$@"
    fi
done
echo "error: no Python 3.11 or newer with PyTorch: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt" >&2
exit 2
