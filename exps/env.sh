# Finds a Python that satisfies the requirements, or makes one. Sourced by scripts that stand in the project's root.
#   use_python FILE...     sets PYTHON to the active environment's python, else .venv's; fails where none satisfies FILE...
#   make_python FILE...    the same, but installs into .venv what is missing
#   pipeline SCRIPT ARGUMENT...    runs the script of that name; $root is set, and paths are seen from where one stands
set -eu

# Whether the python $1 is new enough and holds what the requirement files $2... name.
satisfies() {
    command -v "$1" >/dev/null 2>&1 || return 1
    "$1" - "${@}" 2>/dev/null <<'PYTHON'
import importlib.metadata as metadata
import sys

from packaging.requirements import Requirement

assert sys.version_info >= (3, 11)
for name in sys.argv[2:]:
    for line in open(name):
        line = line.partition("#")[0].strip()
        if line:
            requirement = Requirement(line)
            assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
PYTHON
}

use_python() {
    for PYTHON in python python3 .venv/bin/python; do
        if satisfies "$PYTHON" "$@"; then
            return
        fi
    done
    echo "error: no Python with the packages of $*; run:" \
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt" >&2
    exit 2
}

make_python() {
    for PYTHON in python python3 .venv/bin/python; do
        if satisfies "$PYTHON" "$@"; then
            return
        fi
    done
    for base in "${BASE_PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$base" >/dev/null 2>&1 && "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "making .venv with $base: the packages of $* (PyTorch is large: some minutes)"
            "$base" -m venv .venv
            # shellcheck disable=SC2046  # one -r FILE pair per file, no blanks in their names
            .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@")
            PYTHON=.venv/bin/python
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; install it (Debian: apt-get install python3 python3-venv)" >&2
    exit 2
}

pipeline() {
    script=$1 caller=$(pwd)
    shift
    cd "$root"
    case "$script $* " in
        *' --dry-run '* | *' --help '* | *' -h '*) use_python requirements.txt ;;
        quickstart\ *) make_python requirements.txt ;;
        *) use_python requirements.txt ;;
    esac
    exec "$PYTHON" exps/pipeline.py "$script" "$caller" "$@"
}
