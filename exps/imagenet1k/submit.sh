#!/bin/sh
# ImageNet-1k on Slurm: denoiser, denoised copy, DINOv2, N2N + DINOv2, NC and NCT for each of two noises, and the linear
# probe of every checkpoint and of the floors, as jobs that wait for what they need. A job is requeued at its time limit
# and when it is preempted, and goes on from its checkpoint.
#   sh exps/imagenet1k/submit.sh --partition P [--gpus 4] [--time 1-00:00:00] [NOISE...] [--data imagenet] [--dry-run]
root=$(cd "$(dirname "$0")/../.." && pwd)
. "$root/exps/env.sh"
pipeline imagenet1k/submit "$@"
