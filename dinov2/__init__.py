"""DINOv2 pretraining that is robust to noise.

`dinov2.pretrain(folder)` is the whole method on a folder of images, `dinov2.embed(weights, folder)` gives the features
of a folder, `dinov2.load_backbone(weights)` a trained backbone.
"""

import importlib
import types

from utils.results import VERSION as __version__

# Name → module, on demand: `import dinov2` alone must not cost the import of torch.
_ON_DEMAND = {"embed": "dinov2.embed", "load_backbone": "dinov2.embed", "pretrain": "dinov2.pretrain"}
__all__ = ["__version__", *_ON_DEMAND]


class CommandModule(types.ModuleType):
    """A module that is a command, and a function of its own name: dinov2.embed(...) is `python -m dinov2.embed`."""

    def __call__(self, *args, **kwargs):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def __getattr__(name: str):
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'dinov2' has no attribute {name!r}")
    module = importlib.import_module(_ON_DEMAND[name])
    return module if module.__name__ == f"dinov2.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
