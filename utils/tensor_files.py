"""Files of torch.save, read without running anything in them and only where they are as they were written."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch


def load_tensors(path: Path | str, device: torch.device | str = "cpu") -> dict:
    """Tensors and plain containers of a torch file. ValueError names a file that is truncated, damaged or holds code.

    torch.save gives each part of its archive a CRC-32, and torch.load does not look at it. Files of the form before
    PyTorch 1.6 have none.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of its part {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than weights (a pickle with code in it?): refused") from None
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} can't be read as a torch file: {reason}") from None
