"""The ground floor: noise, image trees, progress, results and the report. Imports none of the other packages."""

import os

# OpenMP's threads spin while they wait for work. On cores that others want too, long spinning takes from the thread
# that is waited for; none at all costs a third on a quiet machine (docs/performance.md). Read when torch is loaded,
# which every package does after this; a user's own setting stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
