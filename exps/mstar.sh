#!/bin/sh
# Real noise of which no clean version exists: MSTAR radar chips, DINOv2, N2N + DINOv2, NC, NCT and the floors, three seeds.
# The denoiser is trained on every second pixel, because the speckle is correlated over one (docs/denoiser.md). Stop it at
# any moment and call it again, it goes on where it was. The chips come from: python exps/crop_chips.py --size 64 ...
#   sh exps/mstar.sh --data mstar64 [--dry-run] [key=value]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
case " $* " in
    *" -h "* | *" --help "*) exec sed -n '2,/^set/s/^# \{0,1\}//p' "$0" ;;
esac

for seed in 0 1 2; do
    for method in dinov2 n2n nc nct; do
        sh "$root/exps/quickstart.sh" --scale mstar --output "$root/runs/mstar" --noise none --seed "$seed" \
            --method "$method" --eval knn --eval linear --channels 1 "data.mean=[0.544]" "data.std=[0.177]" "$@"
    done
done
