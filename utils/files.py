"""Files and folders that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import locks


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a new folder; it becomes `path` when the block ends well.

    Else it is removed. What a killed process leaves has ".tmp-" in its name; utils.locks.sweep() removes it. An OSError
    that names no file, as that of a full disk, is raised anew with the name of this one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{locks.mine()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise named(error, path) from error
        raise


def named(error: OSError, path: Path | str) -> OSError:
    """The error, saying which file it is about: that of a write() does not."""
    if error.errno is None:
        return OSError(f"{path} cannot be written: {error}")
    return OSError(error.errno, os.strerror(error.errno), str(path))
