#!/bin/sh
# Stage 7: the table of all runs under the output folder with their floors, and report.html, one self-contained page.
#   sh exps/7_report.sh --output DIR
[ "${exps_options:-}" = read ] || . "$(dirname "$0")/common.sh"

set --
for config in "$output"/*/*/config.yaml "$output"/clean*/config.yaml "$output"/floors/*/*/config.yaml; do
    if [ -e "$config" ]; then
        set -- "$@" "$(dirname "$config")"
    fi
done
if [ -n "$dry" ]; then
    set -- "$output/*/*"
fi
run "$PYTHON" -m utils.report "$@" --output "$output/report.html"
