"""Files and folders that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import locks


@contextmanager
def naming_errors(path: Path | str) -> Iterator[None]:
    """An OSError of writing, which may say nothing of the file, becomes one that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a new folder; it becomes `path` when the block ends well.

    Else it is removed. What a killed process leaves has ".tmp-" in its name; utils.locks.sweep() removes it. An OSError
    that names no file, as that of a full disk, is raised anew with the name of this one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{locks.process_tag()}")
    try:
        with naming_errors(path):
            yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise
