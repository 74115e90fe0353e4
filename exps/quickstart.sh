#!/bin/sh
# The whole path, from nothing to the report: noise, denoiser, denoised copy, pretraining by all methods, probes, report.
# Makes .venv if the active environment does not satisfy requirements.txt. What is finished is skipped; what was
# interrupted goes on. Without --data: scikit-learn's digits under gauss100 on a CPU, in minutes.
#   bash exps/quickstart.sh
#   bash exps/quickstart.sh --data DIR --noise shot3 --scale imagenet100
make_environment=yes
. "$(dirname "$0")/common.sh"

stages="2_train_denoiser 3_denoise 4_metadata 5_pretrain 6_evaluate 7_report"
if grep -q '^  storage: disk' "$scale_file"; then
    stages="1_generate_noise $stages"
fi
if [ -z "$dry" ]; then
    "$PYTHON" -m utils.locks "$output" quickstart $$
    trap 'rm -f "$output/.lock-quickstart"' EXIT
fi
started=$(date +%s)
for stage in $stages; do
    echo "== $stage"
    . "exps/$stage.sh"
done
echo "== $(($(date +%s) - started)) s; the report: $output/report.html"
if [ "$data" = "$output/digits" ] && [ -z "$dry$steps$per_class" ]; then
    echo "== for comparison, five seeds of ours (docs/results.md): mean and standard deviation of top-1 in %"
    sed -n '/^<!-- five seeds/,/^<!-- end/{/^|/p;}' docs/results.md
fi
