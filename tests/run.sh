#!/bin/bash
# All tests, in the environment of the quickstart (made if need be) with the test dependencies added.
#   bash tests/run.sh [PYTEST OPTION...]
set -eu
cd "$(dirname "$0")/.."
. exps/env.sh
make_python requirements.txt tests/requirements.txt
# What lightly requires for its own trainings would replace packages; its losses need none of it.
"$PYTHON" -c "import lightly" 2>/dev/null || "$PYTHON" -m pip install --quiet --no-deps "lightly>=1.5" ||
    echo "without lightly: the contrastive losses are not compared with its"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# One thread a process: two processes share two cores, and sums are the same on every machine.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n "${PYTEST_WORKERS:-2}" -q tests "$@"
