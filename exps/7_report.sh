#!/bin/sh
# Stage 7: the table of all runs under the output folder with their floors, and report.html, one self-contained page.
#   sh exps/7_report.sh --output DIR
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline 7_report "$@"
