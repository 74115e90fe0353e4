"""A CUDA device that is not there. Its tensors say that they are on cuda:0 and hold their values in the CPU's memory.

    with FakeCuda() as gpu:
        ...  # code that trains on torch.device("cuda")
    assert gpu.waits == [] and len(gpu.copies) == 2

Operations give true results. One that mixes the devices fails as on a GPU; every wait of the host for the device is
noted in `waits`, every copy from the host that is not waited for in `copies`, with the project's function that asks.
Not seen: CUDA's own kernels, and the backward pass, for which autograd asks a driver (`without_backward` skips it).
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dinov2.layers import attention
from tests.conftest import ROOT

# Their results have a size, or are a number, that only the device knows.
WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "_local_scalar_dense", "equal"}
INDEXING = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
}  # take indices from the host too: a copy, waited for


class OnCuda(torch.Tensor):
    """A tensor of the fake device; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnCuda:
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="cuda:0", **place)
        tensor.inner = inner.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of FakeCuda")

    def tolist(self) -> list:
        return self.cpu().tolist()


def caller() -> str:
    """The innermost function of the project on the stack, tests left out: dinov2/train/trainer.py read."""
    frame = sys._getframe(1)
    while frame:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        ours = path.startswith(f"{ROOT}/") and not path.startswith((f"{ROOT}/tests/", f"{ROOT}/.venv/"))
        if ours and not name.startswith("<"):
            return f"{path.removeprefix(f'{ROOT}/')} {name}"
        frame = frame.f_back
    return "tests"


class Stream:
    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class FakeCuda(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.patches: list[ExitStack] = []

    def __enter__(self) -> FakeCuda:
        stack = ExitStack()
        if not self.patches:
            torch._C._ensureCUDADeviceGuardSet()  # for good: a guard that asks no driver, where there is none
            stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its tensor here and copies it
            kept = torch.__future__.get_overwrite_module_params_on_conversion()
            stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, kept)
            torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module that moves gets new parameters
            for target, value in self.replacements().items():
                stack.enter_context(mock.patch(target, value))
        self.patches.append(stack)
        return super().__enter__()

    def __exit__(self, *exception: object):
        self.patches.pop().close()
        return super().__exit__(*exception)

    def replacements(self) -> dict[str, object]:
        """What would ask a driver, and the two attention kernels that a CPU does not have."""
        gpu, per_size, sdpa = self, attention.attend_per_size, torch.nn.functional.scaled_dot_product_attention

        class Event:
            def record(self) -> None:
                pass

            def synchronize(self) -> None:
                gpu.waits.append(caller())

        def attend(q, k, v):
            if not isinstance(q, OnCuda):
                return sdpa(q, k, v)
            return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v

        def attend_varlen(qkv, packing):
            assert packing.starts.is_cuda and packing.starts.dtype == torch.int32
            return per_size(qkv, packing)

        values = {"is_available": True, "current_device": 0, "device_count": 1, "max_memory_allocated": 0}
        values |= {"is_current_stream_capturing": False, "set_device": None, "_lazy_init": None, "synchronize": None}
        values |= {"is_bf16_supported": True, "current_stream": Stream(), "stream": nullcontext()}
        no_grad, inference = torch.autograd.grad_mode.no_grad, "torch.autograd.grad_mode.inference_mode"
        fixed = {f"torch.cuda.{name}": lambda *_, value=value: value for name, value in values.items()}
        return fixed | {
            f"{inference}.__enter__": no_grad.__enter__,  # a tensor of this kind has no views there
            f"{inference}.__exit__": no_grad.__exit__,
            "torch.cuda.Event": Event,
            "torch.cuda.Stream": Stream,
            "torch.Tensor.pin_memory": lambda tensor, *_: tensor,
            "torch.Tensor.record_stream": lambda *_: None,
            "torch.compile": lambda function, **_: function,
            "torch.Generator": lambda device="cpu", of=torch.Generator: of(),
            "torch.nn.functional.scaled_dot_product_attention": attend,
            "dinov2.layers.attention.attend_varlen": attend_varlen,
        }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # inference mode hands these on whole
                return function.decompose(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        there = [x for x in tensors if isinstance(x, OnCuda)]
        if not there and asked != "cuda":
            return function(*args, **kwargs)
        self.check(function._opname, args, kwargs, tensors, there, asked)
        if asked == "cuda":
            kwargs["device"] = "cpu"
        known = {id(x.inner): x for x in there}  # an operation in place returns its argument
        result = function(*unwrapped(args), **unwrapped(kwargs))
        if asked == "cpu" or (function._opname == "copy_" and args[0].device.type == "cpu"):
            return result
        return tree_map(lambda x: known[id(x)] if id(x) in known else wrapped(x), result)

    def check(self, name: str, args, kwargs, tensors, there, asked) -> None:
        """Notes waits and copies; RuntimeError where the devices are mixed."""
        if name in ("copy_", "_to_copy"):
            moved = len({x.device.type for x in tensors} | ({asked} if asked else set())) > 1
            background = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if moved and not background:
                self.waits.append(caller())
            elif moved and not isinstance(args[-1 if name == "_to_copy" else 1], OnCuda):
                self.copies.append(caller())
            return
        indices = [x for x in args[1] if x is not None] if name in INDEXING else []
        chosen_here = [x for x in indices if not isinstance(x, OnCuda)]
        others = [x for x in tensors if x.dim() > 0 and not isinstance(x, OnCuda)]
        if there and len(others) > len(chosen_here):
            raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU, in {caller()}")
        by_mask = any(x.dtype == torch.bool for x in indices)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or chosen_here or unsized:
            self.waits.append(caller())


def wrapped(value):
    return OnCuda(value) if isinstance(value, torch.Tensor) else value


def unwrapped(values):
    return tree_map(lambda x: x.inner if isinstance(x, OnCuda) else x, values)


@contextmanager
def without_backward(module: torch.nn.Module):
    """In place of each backward pass, the module's parameters get gradients of 0."""

    def backward(*_: object) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)

    with mock.patch("torch.Tensor.backward", backward):
        yield
