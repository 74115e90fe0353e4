"""How every command-line tool ends: user errors in one line, Ctrl-C without a traceback."""

import signal
import sys
from collections.abc import Callable

ENDED = {  # words of PyTorch's RuntimeErrors after the end of another process: what to do
    "DataLoader worker": "a loader process was ended, from outside or for lack of memory; use fewer (data.workers=0 of "
    "a run, --workers 0 of a tool) or, in a container, give it more shared memory (docker run --shm-size=8g)",
    "onnection closed by peer": "another rank has ended, see its own message; start all of them again to go on",
    "onnection reset by peer": "another rank has ended, see its own message; start all of them again to go on",
    "Timed out waiting": "another rank does not answer, see its own messages; start all of them again to go on",
}


def run(main: Callable[[], int | None]) -> None:
    """Call main() and leave the process with its exit code (None: 0).

    ValueError and OSError (bad input, full disk, no permission) and the end of another process become `error: ...` on
    stderr and exit code 2; Ctrl-C becomes one line and exit code 130. Anything else is a bug and keeps its traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as utils/__init__.py left it while this was loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted; what is written is whole, run the same command again to go on", file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        advice = next((advice for words, advice in ENDED.items() if words in str(error)), None)
        if advice is None:
            raise
        print(f"error: {advice} ({str(error).splitlines()[0]})", file=sys.stderr)
        code = 2
    ranks = sys.modules.get("utils.distributed")  # not imported here: it loads PyTorch
    if ranks is not None and ranks.joined:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        ranks.leave(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)
