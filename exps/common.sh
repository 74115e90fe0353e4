# Shared by the scripts of this folder: options, paths, and how a command is run once. Sourced, never run. POSIX sh.
#
# Options of every stage (a stage ignores what it does not need):
#   NOISE...  --noise NOISE   gauss50 gauss100 gauss255 shot10 shot3 shot1 speckle0.4 speckle0.7 speckle1.0 or any level;
#                             none: the images are noisy by nature                         [gauss100]
#   --scale NAME              quickstart, imagenette, mstar, imagenet100, imagenet1k, or a YAML    [quickstart]
#   --data DIR                folder with {train,val}/<class>/<image>                       [the scale's]
#   --channels N              of the images [3]; with it, copies are .npy, not rounded to 8 bits; N other than 3 needs
#                             data.mean=[...] and data.std=[...], N numbers each
#   --max-pixels N            of an image file; one that claims more is refused             [8192 x 8192]
#   --output DIR              runs, results and report                                      [runs/<scale> or runs/<name of DIR>]
#   --method NAME             dinov2, n2n, nc, nct, clean; may be repeated                  [all]
#   --seed N                  of weights, crops and order; may be repeated: one run of each method for each   [the scale's]
#   --eval NAME               linear, knn, log_regression, pca, robustness; may be repeated [linear knn pca]
#   --floor WEIGHTS           a public frozen backbone, evaluated as a third floor              [none]
#   --checkpoints WHICH       last, best, all or an epoch                                   [last]
#   --gpus N                  processes of the pretraining, one a GPU                       [1]
#   --partition P --time LIMIT  Slurm's, for the scripts that submit jobs
#   --steps N                 a trial: every schedule cut to about N iterations
#   --per-class N             a trial: the first N images of each class
#   --dry-run                 print the commands, run nothing
#   key=value                 any key of dinov2/configs/default.yaml
set -eu

from=$(pwd)
cd "$(dirname "$0")"
while [ ! -e exps/common.sh ]; do cd ..; done
root=$(pwd)
. exps/env.sh

usage() {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$script"
    sed -n '3,/^set/{/^#/s/^# \{0,1\}//p;}' exps/common.sh
    exit "$1"
}

# A path of the caller, seen from the project's root.
from_root() {
    case $1 in
        /*) path=$1 ;;
        *) path=$from/$1 ;;
    esac
    path=${path%/}
    path=${path#"$root/"}
    case $path in
        -*) path=./$path ;; # else an option to basename and the like
    esac
    printf '%s\n' "$path"
}

# Arguments as a shell would read them back.
quoted() {
    for argument; do
        case $argument in
            '' | *[!A-Za-z0-9_./:=,+@%-]*) printf "'%s' " "$(printf '%s' "$argument" | sed "s/'/'\\\\''/g")" ;;
            *) printf '%s ' "$argument" ;;
        esac
    done
}

# say MARK COMMAND... prints it.
say() {
    mark=$1
    shift
    text=$(quoted "$@")
    printf '%s %s\n' "$mark" "${text% }"
}

# run COMMAND...: prints it, and runs it unless --dry-run; the first failure ends the script.
run() {
    say + "$@"
    [ -z "$dry" ] || return 0
    "$@" || {
        code=$?
        echo "stopped: the command above ended with exit code $code" >&2
        exit $code
    }
}

# once MARKER STATE COMMAND...: as run, but skipped when MARKER says that the very same command ended well in the same
# STATE (sums of what it read). The marker is written last: an interrupted command is run again, and goes on by itself.
once() {
    marker=$1 state="$2"
    shift 2
    state=$(quoted "$@" && printf '\n%s' "$state")
    if [ -z "$dry" ] && [ -f "$marker" ] && [ "$(cat "$marker")" = "$state" ]; then
        say "finished before:" "$@"
        return
    fi
    run "$@"
    [ -z "$dry" ] || return 0
    mkdir -p "$(dirname "$marker")"
    printf '%s\n' "$state" >"$marker.tmp"
    mv "$marker.tmp" "$marker"
}

# Sums of files, empty for those that are not there: the state of `once`.
sums() { cksum "$@" 2>/dev/null || true; }

# State of data folders: what lies in them by itself, and the times of their splits and class folders, not every image.
# Not by ls, whose times are of the minute. Hidden files, such as the list of images, are left out.
tree_state() {
    "$PYTHON" - "$@" <<'PYTHON' | cksum
import os
import sys


def state(folder, depth):
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if not entry.name.startswith(".") and (depth == 0 or entry.is_dir()):
                print(entry.path, entry.stat().st_size, entry.stat().st_mtime_ns)
                if depth < 1 and entry.is_dir():
                    state(entry.path, depth + 1)
    except OSError as error:
        print(error.strerror)


for folder in sys.argv[1:]:
    state(folder, 0)
PYTHON
}

# Folders of noisy and denoised copies: beside the data, or in Neighbor2Neighbor/ where the published steps move them.
tree() {
    for place in "$trees" Neighbor2Neighbor; do
        [ ! -d "$place/$1" ] || break
        place=$trees
    done
    place=$place/$1
    printf '%s\n' "${place#./}"
}
noisy_tree() { tree "noisy_$(basename "$data")-$1"; }
denoised_tree() {
    case $1 in
        none) tree "$(basename "$data")-denoised" ;;
        *) tree "noisy_$(basename "$data")-$1-denoised" ;;
    esac
}

# Folder of a run of the seed $seed (empty: none was asked for). The clean ceiling serves every noise.
run_folder() {
    case $2 in
        clean) printf '%s\n' "$output/clean$(of_seed)" ;;
        *) printf '%s\n' "$output/$1/$2$(of_seed)" ;;
    esac
}
first_seed() {
    for seed in $seeds; do
        [ "$seed" = default ] || printf '%s\n' "$seed"
        return
    done
}
of_seed() {
    case $seed in
        '' | 0) ;;
        *) printf '%s\n' "-seed$seed" ;;
    esac
}

# View that a method is evaluated on.
view_of() {
    case $1 in
        n2n) echo denoised ;;
        clean) echo clean ;;
        *) echo noisy ;;
    esac
}

# Those of --eval that floors are made for, with commas between.
floor_evals() {
    for name in $evals; do
        case $name in
            linear | knn) echo "$name" ;;
        esac
    done | paste -s -d , -
}

# for_floors FOLDER COMMAND...: COMMAND with the arguments of dinov2.eval.floors for the run in FOLDER.
for_floors() {
    pretrained=$1
    shift
    set -- "$@" "run=$pretrained" "output=$output" "evaluators=$(floor_evals)"
    [ -z "$floor" ] || set -- "$@" "weights=$floor"
    eval "set -- \"\$@\" $eval_overrides"
    "$@"
}

# The methods that run under noise $1: without the ceiling, and without nct where neither the scale's table nor the
# command has the anchor's lambda (unless nct is all that is asked for: then the trainer says so).
methods_under() {
    for name in $methods; do
        case $name in
            clean) continue ;;
            nct)
                if [ "$methods" != nct ] && ! { sed 's/#.*//' "$scale_file"; echo "$overrides"; } |
                    grep -qE "[{ ]$1: |anchor\.weights\.$1="; then
                    continue
                fi ;;
        esac
        echo "$name"
    done
}

# Whether the ceiling is wanted and there is one: images that are noisy by nature have no clean version.
with_ceiling() {
    case $methods in
        *clean*) [ "$noises" != none ] ;;
        *) false ;;
    esac
}

script=$0
# A script that is one experiment sets default_... before it sources this.
noises='' methods='' seeds='' seed='' evals='' overrides='' eval_overrides='' scale=${default_scale:-quickstart} data='' output=''
checkpoints=${default_checkpoints:-last} gpus=${default_gpus:-1} partition='' time='' steps='' per_class='' channels=''
max_pixels='' floor='' dry=''
while [ $# -gt 0 ]; do
    case $1 in
        --noise | --scale | --data | --output | --method | --seed | --eval | --checkpoints | --gpus | --partition | --time | \
            --steps | --per-class | --channels | --max-pixels | --floor)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;
    esac
    case $1 in
        --noise) noises="$noises $2" && shift ;;
        --scale) scale=$2 && shift ;;
        --data) data=$(from_root "$2") && shift ;;
        --output) output=$(from_root "$2") && shift ;;
        --method) methods="$methods $2" && shift ;;
        --seed) seeds="$seeds $2" && shift ;;
        --eval) evals="$evals $2" && shift ;;
        --floor) floor=$(from_root "$2") && shift ;;
        --checkpoints) checkpoints=$2 && shift ;;
        --gpus) gpus=$2 && shift ;;
        --partition) partition=$2 && shift ;;
        --time) time=$2 && shift ;;
        --steps) steps=$2 && shift ;;
        --per-class) per_class=$2 && shift ;;
        --channels) channels=$2 && shift ;;
        --max-pixels) max_pixels=$2 && shift ;;
        --dry-run) dry=yes ;;
        -h | --help) usage 0 ;;
        -*) echo "error: unknown option $1; see sh $script --help" >&2 && exit 2 ;;
        eval.*=*) eval_overrides="$eval_overrides$(quoted "$1")" ;;
        *=*) overrides="$overrides$(quoted "$1")" ;;
        *) noises="$noises $1" ;;
    esac
    shift
done

case $scale in
    *.yaml | *.yml) scale=$(from_root "$scale") scale_file=$scale ;;
    *) scale_file=dinov2/configs/$scale.yaml ;;
esac
[ -f "$scale_file" ] || { echo "error: no scale $scale: there is no $scale_file" >&2; exit 2; }
for number in $seeds; do
    case $number in
        *[!0-9]*) echo "error: --seed takes a whole number, not $number" >&2 && exit 2 ;;
    esac
done
seeds=${seeds:-default}
for number in "$gpus" "${steps:-1}" "${per_class:-1}" "${channels:-1}" "${max_pixels:-1}"; do
    case $number in
        '' | *[!0-9]* | 0)
            echo "error: --gpus, --steps, --per-class, --channels and --max-pixels take a whole number of at least 1," \
                "not $number" >&2
            exit 2 ;;
    esac
done
if [ -n "$channels" ]; then
    case "$channels $overrides" in
        3\ * | *data.mean=*data.std=* | *data.std=*data.mean=*) ;;
        *)
            echo "error: --channels $channels needs data.mean=[...] and data.std=[...], $channels numbers each" >&2
            exit 2 ;;
    esac
    overrides="${overrides}data.in_chans=$channels "
fi
if [ -n "$max_pixels" ]; then
    overrides="${overrides}data.max_pixels=$max_pixels "
fi
scale_name=$(basename "$scale_file" | sed 's/\.ya\{0,1\}ml$//')
if [ -z "$output" ]; then
    output=runs/${data:+$(basename "$data")}
    [ -n "$data" ] || output=runs/$scale_name
    output=$output${per_class:+-$per_class}${steps:+-trial}
fi
if [ -z "$data" ]; then
    case $scale_name in
        quickstart) data=$output/digits ;;
        imagenette) data=imagenette96 ;;
        mstar) data=mstar64 ;;
        imagenet1k) data=imagenet ;;
        *) data=mini-imagenet ;;
    esac
fi
noises=${noises:-${default_noises:-gauss100}}
methods=${methods:-${default_methods:-dinov2 n2n nc nct clean}}
evals=${evals:-${default_evals:-linear knn pca}}
noises=${noises# } methods=${methods# } evals=${evals# }
if [ -n "$steps$per_class" ]; then
    overrides="${overrides}trial=true "
fi
if [ -n "$steps" ]; then
    # Two epochs of a denoised run, a restart after the first, and one noisy epoch.
    half=$(((steps + 1) / 2))
    overrides="${overrides}train.epochs=2 train.epoch_length=$half train.eval_every=1 curriculum.restart_epoch=1 \
curriculum.noisy_epochs=1 anchor.epoch=1 teacher.warmup_temp_epochs=1 optim.warmup_epochs=0 \
curriculum.noisy_set.teacher.warmup_temp_epochs=1 curriculum.noisy_set.optim.warmup_epochs=0 "
    eval_overrides="${eval_overrides}eval.linear.epochs=1 eval.linear.epoch_length=$steps "
fi
if [ -n "${make_environment:-}" ] && [ -z "$dry" ]; then
    make_python requirements.txt
else
    use_python requirements.txt
fi
if [ "$data" = "$output/digits" ]; then
    once "$output/.done/digits" "" "$PYTHON" exps/make_digits.py --output "$data"
fi
if [ -n "$per_class" ]; then
    whole=$data
    data=$output/$(basename "$whole")-$per_class
    once "$output/.done/subset" "" "$PYTHON" exps/subset.py --source "$whole" --per-class "$per_class" --output "$data"
fi
# Copies lie beside the data, or with the runs where the data folder's place cannot be written.
trees=$(dirname "$data")
if [ -d "$trees" ] && [ ! -w "$trees" ]; then
    trees=$output/trees
fi
exps_options=read
