#!/bin/sh
# Main experiment on ImageNet-100: DINOv2, N2N + DINOv2 and NC under all nine noises, every checkpoint probed.
# Needs mini-imagenet/ and its denoised copies (Neighbor2Neighbor/linear_probe_n2n.sh).
#   sh exps/linear_probe.sh [NOISE...]
default_noises="gauss50 gauss100 gauss255 speckle0.4 speckle0.7 speckle1.0 shot10 shot3 shot1"
default_methods="dinov2 n2n nc" default_evals=linear default_checkpoints=all default_scale=imagenet100
. "$(dirname "$0")/common.sh"

# Noise by noise, so that the first table is there before the last denoised run has begun.
for one in $noises; do
    noises=$one
    . exps/5_pretrain.sh
    . exps/6_evaluate.sh
done
. exps/7_report.sh
