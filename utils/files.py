"""Files and folders that are complete or do not exist."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import locks


@contextmanager
def naming_errors(path: Path | str) -> Iterator[None]:
    """Turns an OSError of writing without a file name into one that names the file."""
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
    """A temporary path beside `path`, for a file or a new folder; it becomes `path` if the block succeeds.

    Otherwise it is removed. What a killed process leaves has ".tmp-" in its name; utils.locks.sweep() removes it. An
    OSError that names no file, as on a full disk, is raised again with this name.
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


def write_text(path: Path | str, text: str) -> None:
    """Writes a UTF-8 file as atomic_path() does: whole or not at all. Its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
