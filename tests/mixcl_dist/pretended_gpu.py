"""A GPU that is none: what lies on it is computed by the CPU, but refuses what a GPU's tensors refuse.

Unlike `imagined_gpu`, whose tensors have no numbers, it can be learnt on. Its device is "meta", as autograd knows no
other one without hardware.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")


class OnGpu(Tensor):
    """`held` in main memory, as a tensor on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})

    def numpy(self, *_, **__):
        raise TypeError("can't convert a GPU's tensor to numpy; copy it to main memory first")

    __array__ = numpy

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)  # as whoever saves a GPU's tensor loads it into main memory


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Block in which tensors may be made on, and moved to, the device that is given."""
    autocast = torch.autocast

    def autocast_elsewhere(device_type: str, **settings):
        return nullcontext() if device_type == DEVICE.type else autocast(device_type, **settings)

    with (
        mock.patch.object(torch, "autocast", autocast_elsewhere),
        mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type]),
        mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True),
        _Dispatch(),
        _Constants(),
    ):
        yield DEVICE


class _Dispatch(TorchDispatchMode):
    """Lets the device also have what is made on it from nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():  # there, operators that are made of others come whole
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _computed(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """`torch.tensor` is dispatched in main memory alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = dict(kwargs or {})
        if func is torch.tensor and given.get("device") is not None:
            device = given.pop("device")
            return torch.tensor(*args, **given).to(device)
        return func(*args, **given)


def _computed(func, args, kwargs):
    """What an operator makes of tensors on one device, which its result is on, too; numbers may be on the other."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, OnGpu) for tensor in tensors]
    mixed = any(there) and any(tensor.dim() for on, tensor in zip(there, tensors, strict=True) if not on)
    if mixed and not _may_mix(func._schema.name, there[0]):
        shapes = [f"{tuple(tensor.shape)} {type(tensor).__name__}" for tensor in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {', '.join(shapes)}")
    if (wanted := kwargs.get("device")) is not None:
        on_gpu = torch.device(wanted) == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
    else:
        on_gpu = there[0] if mixed else any(there)
    held_args, held_kwargs = tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs))
    result = func(*held_args, **held_kwargs)
    if not on_gpu:
        return result
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnGpu, result))


def _may_mix(name: str, first_there: bool) -> bool:
    """Whether an operator copies between devices, or takes elements of a GPU's tensor by indices in main memory."""
    return name in ("aten::copy_", "aten::_to_copy") or (first_there and name.startswith("aten::index"))
