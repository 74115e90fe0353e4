#!/bin/sh
# NCT on ImageNet-100 under the four noises whose lambda was published, every checkpoint probed. The denoised runs of
# linear_probe.sh are used; where one is missing, its part up to the restart is trained first.
#   sh exps/linear_probe_nct.sh [NOISE...]
default_noises="gauss255 gauss100 shot1 speckle1.0"
default_methods=nct default_evals=linear default_checkpoints=all default_scale=imagenet100
. "$(dirname "$0")/common.sh"

for one in $noises; do
    noises=$one
    . exps/5_pretrain.sh
    . exps/6_evaluate.sh
done
. exps/7_report.sh
