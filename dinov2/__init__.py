"""DINOv2 pretraining that is robust to noise.

`dinov2.load_backbone(weights)` gives a trained backbone, `dinov2.embed(weights, folder)` the features of a folder.
"""

import importlib
import types

from utils.results import VERSION as __version__

# From dinov2.embed, on demand: `import dinov2` alone must not cost the import of torch.
_ON_DEMAND = ("embed", "load_backbone")
__all__ = ["__version__", *_ON_DEMAND]


class CommandModule(types.ModuleType):
    """A module that is a command, and a function of its own name: dinov2.embed(...) is `python -m dinov2.embed`."""

    def __call__(self, *args, **kwargs):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def __getattr__(name: str):
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'dinov2' has no attribute {name!r}")
    module = importlib.import_module("dinov2.embed")
    return module if name == "embed" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
