"""How every command-line tool ends: errors of the user in one line, Ctrl-C without a traceback."""

import sys
from collections.abc import Callable


def run(main: Callable[[], int | None]) -> None:
    """Call main() and leave the process with its exit code (None: 0).

    ValueError and OSError (bad input, full disk, no permission) become `error: ...` on stderr and exit code 2;
    Ctrl-C becomes one line and exit code 130. Anything else is a defect and keeps its traceback.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted; what is written is whole, run the same command again to go on", file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
