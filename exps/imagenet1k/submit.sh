#!/bin/sh
# ImageNet-1k on Slurm: denoiser, denoised copy, DINOv2, N2N + DINOv2, NC and NCT for each of two noises, and the linear
# probe of every checkpoint and of the floors, as jobs that wait for what they need. A job is requeued at its time limit
# and when it is preempted, and goes on from its checkpoint.
#   sh exps/imagenet1k/submit.sh --partition P [--gpus 4] [--time 1-00:00:00] [NOISE...] [--data imagenet] [--dry-run]
default_noises="gauss255 gauss100" default_methods="dinov2 n2n nc nct" default_evals=linear default_checkpoints=all
default_scale=imagenet1k default_gpus=4
. "$(dirname "$0")/../common.sh"

# submit NAME DEPENDENCIES GPUS COMMAND...: sets `job` to the id of a job that starts when DEPENDENCIES have ended well.
submit() {
    name=$1 after=$2 devices=$3
    shift 3
    set -- "$PYTHON" -m dinov2.run.submit --nodes 1 --gpus "$devices" ${partition:+--partition "$partition"} \
        ${time:+--time "$time"} --name "$name" ${after:+--dependency "afterok$after"} --folder "$output/slurm/%j" -- "$@"
    say + "$@"
    if [ -n "$dry" ]; then
        job="<$name>"
    else
        job=$("$@")
    fi
}

for noise in $noises; do
    denoiser=$output/$noise/denoiser denoised=$(denoised_tree "$noise") waits='' denoised_run='' seen=''
    if [ ! -e "$denoised/manifest.json" ]; then
        submit "denoiser-$noise" "" 1 Neighbor2Neighbor.train --config Neighbor2Neighbor/imagenet1k.yaml \
            --data "$data" --noise "$noise" --output "$denoiser" ${channels:+--channels "$channels"} \
            ${max_pixels:+--max-pixels "$max_pixels"}
        submit "denoise-$noise" ":$job" "$gpus" Neighbor2Neighbor.denoise --model "$denoiser/unet.pth" \
            --data "$data" --noise "$noise" --output "$denoised" ${channels:+--format npy} \
            ${max_pixels:+--max-pixels "$max_pixels"}
        waits=:$job
    fi
    for method in $methods; do
        folder=$(run_folder "$noise" "$method")
        case $method in
            dinov2 | clean) needs='' ;;
            *) needs=$waits$denoised_run ;; # the first of them trains the denoised run, which the others share
        esac
        set -- "$scale" "$method" "data.root=$data" "output_dir=$folder"
        if [ "$method" != clean ]; then
            set -- "$@" "noise=$noise" "data.denoised_root=$denoised" \
                "curriculum.denoised_dir=$(run_folder "$noise" n2n)"
        fi
        eval "set -- \"\$@\" $overrides"
        submit "$method-$noise" "$needs" "$gpus" train "$@"
        trained=$job
        case $method in
            n2n | nc | nct) denoised_run=${denoised_run:-:$trained} ;;
        esac
        for name in $evals; do
            set -- "run=$folder" "checkpoints=$checkpoints"
            eval "set -- \"\$@\" $eval_overrides"
            submit "$name-$method-$noise" ":$trained" "$gpus" "eval.$name" "$@"
        done
        view=$(view_of "$method")
        case $seen in *"$view"*) continue ;; esac
        seen="$seen $view"
        if [ -n "$(floor_evals)" ]; then
            for_floors "$folder" submit "floors-$view-$noise" ":$trained" "$gpus" eval.floors
        fi
    done
done
