"""What all packages use: noise, image trees, progress, results, the report. Imports none of the other packages."""

import os
import signal
import sys
from pathlib import Path

# While one of our programs is still loading under `python -m`, which takes seconds, Ctrl-C ends it without a traceback;
# later utils.cli handles it. sys.argv[0] is -m until the program itself runs. Other programs are not touched.
_MODULE = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if sys.argv[:1] == ["-m"] else []
_OURS = _MODULE and _MODULE[0].partition(".")[0] in ("dinov2", "Neighbor2Neighbor", "toy_mnist", "utils")
_SCRIPT = Path(*sys.argv[:1]).resolve().parent == Path(__file__).resolve().parents[1] / "exps"
if (_OURS or _SCRIPT) and {"-h", "--help"} & set(sys.argv[1:]):
    from utils import quick_help

    quick_help.install()
if _OURS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in a background job
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# OpenMP's threads spin while they wait for work. On a busy machine long spinning slows the thread that they wait for;
# none at all costs a third on a quiet one (docs/performance.md). torch reads the variable when it is loaded, which
# every package does after this; a user's own setting is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
