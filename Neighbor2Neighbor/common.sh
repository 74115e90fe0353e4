# Shared by the scripts of this folder: options, and how a command is run. Sourced, never run. POSIX sh.
# Sets noises, data, models, gpus, dry, train_options; `run COMMAND...` prints a command and, unless dry, runs it.
here=$(pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
noises='' data='' models='' gpus=1 dry=''
while [ $# -gt 0 ]; do
    case $1 in
        --data | --models | --gpus) [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;
    esac
    case $1 in
        --data) data=$2 && shift ;;
        --models) models=$2 && shift ;;
        --gpus) gpus=$2 && shift ;;
        --dry-run) dry=yes ;;
        -h | --help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
        --) shift && break ;;
        -*) echo "error: unknown option $1; see sh $0 --help" >&2 && exit 2 ;;
        *) noises="$noises $1" ;;
    esac
    shift
done
noises=${noises:-gauss50 gauss100 gauss255 speckle0.4 speckle0.7 speckle1.0 shot10 shot3 shot1}

# The tools are started in the project's root, so paths of the caller are made absolute.
absolute() {
    case $1 in
        /*) printf '%s\n' "${1%/}" ;;
        *) printf '%s\n' "$here/${1%/}" ;;
    esac
}

run() {
    echo "+ $*"
    [ -z "$dry" ] || return 0
    "$@"
}

# A module of the project, on so many GPUs as --gpus says.
module() {
    if [ "$gpus" -gt 1 ]; then
        run "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m "$@"
    else
        run "$PYTHON" -m "$@"
    fi
}

cd "$root"
. exps/env.sh
use_python requirements.txt
