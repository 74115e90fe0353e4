#!/bin/sh
# The paper in miniature: ten ImageNet classes at 64 pixels, DINOv2, N2N + DINOv2, NC, NCT, the clean oracle and the floors
# under gauss100 with three seeds, then under gauss255 with one. One run after another, each evaluated when it is trained:
# stop it at any moment and call it again, it goes on where it was, and the report holds what is there. With cores for several
# runs at a time, the same runs of a noise: quickstart.sh --scale imagenette --output runs/miniature --seed 0 --seed 1 --jobs 4
#   sh exps/miniature.sh [--data imagenette96] [--dry-run] [key=value]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
case " $* " in
    *" -h "* | *" --help "*) exec sed -n '2,/^set/s/^# \{0,1\}//p' "$0" ;;
esac

for job in gauss100:0 gauss100:1 gauss100:2 gauss255:0; do
    for method in dinov2 n2n nc nct clean; do
        sh "$root/exps/quickstart.sh" --scale imagenette --output "$root/runs/miniature" --noise "${job%:*}" --seed "${job#*:}" \
            --method "$method" --eval knn --eval linear "$@"
    done
done
