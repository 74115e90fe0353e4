#!/bin/sh
# Stage 4: file lists of the data and its copies, built ahead. Optional: runs build a missing one themselves.
#   sh exps/4_metadata.sh NOISE... --data DIR
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/exps/env.sh"
pipeline 4_metadata "$@"
