"""The ground floor: noise, image trees, progress, results and the report. Imports none of the other packages."""

import os
import signal
import sys
from pathlib import Path

# While `python -m` of a program of ours still loads, which takes seconds, Ctrl-C ends it without a traceback; then
# utils.cli says how it ends. sys.argv[0] is -m before the program itself runs, and a program of others is left alone.
_MODULE = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if sys.argv[:1] == ["-m"] else []
_OURS = _MODULE and _MODULE[0].partition(".")[0] in ("dinov2", "Neighbor2Neighbor", "toy_mnist", "utils")
_SCRIPT = Path(*sys.argv[:1]).resolve().parent == Path(__file__).resolve().parents[1] / "exps"
if (_OURS or _SCRIPT) and {"-h", "--help"} & set(sys.argv[1:]):
    from utils import quick_help

    quick_help.install()
if _OURS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not of a job in the background
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# OpenMP's threads spin while they wait for work. On cores that others want too, long spinning takes from the thread
# that is waited for; none at all costs a third on a quiet machine (docs/performance.md). Read when torch is loaded,
# which every package does after this; a user's own setting stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
