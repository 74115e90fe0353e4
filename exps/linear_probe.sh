#!/bin/sh
# Main experiment on ImageNet-100: DINOv2, N2N + DINOv2 and NC under all nine noises, every checkpoint probed.
# Needs mini-imagenet/ and its denoised copies (Neighbor2Neighbor/linear_probe_n2n.sh).
#   sh exps/linear_probe.sh [NOISE...]
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline linear_probe "$@"
