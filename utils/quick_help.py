"""--help without PyTorch and the like, which take seconds to load: stand-ins for what modules name while imported.

Only in the process of `python -m PROGRAM --help`, which ends with the help: nothing is computed with them.
"""

import importlib.abc
import sys
import types
from importlib.machinery import ModuleSpec

HEAVY = ("torch", "torchvision", "safetensors", "matplotlib", "scipy", "sklearn")


def _stand_in(owner, name: str) -> "_Name":
    """What any attribute of a stand-in is; Python itself asks for the names with two underscores."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (), {})


class _Name(type):
    """A class that stands for anything: a base class, a type, a value, a submodule, what makes a decorator."""

    __getattr__ = _stand_in

    def __getitem__(cls, key):
        return cls

    def __call__(cls, *args, **options):
        return lambda function: function  # as @torch.no_grad() is used


class _Module(types.ModuleType):
    __getattr__ = _stand_in


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    sys.meta_path.insert(0, _Finder())
