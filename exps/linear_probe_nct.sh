#!/bin/sh
# NCT on ImageNet-100 under the four noises whose lambda was published, every checkpoint probed. The denoised runs of
# linear_probe.sh are used; where one is missing, its part up to the restart is trained first.
#   sh exps/linear_probe_nct.sh [NOISE...]
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline linear_probe_nct "$@"
