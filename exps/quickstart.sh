#!/bin/sh
# The whole path, from nothing to the report: noise, denoiser, denoised copy, pretraining by all methods, probes, report.
# Makes .venv if the active environment does not satisfy requirements.txt. What is finished is skipped; what was
# interrupted goes on. Without --data: scikit-learn's digits under gauss100 on a CPU, in minutes.
#   bash exps/quickstart.sh
#   bash exps/quickstart.sh --data DIR --noise shot3 --scale imagenet100
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline quickstart "$@"
