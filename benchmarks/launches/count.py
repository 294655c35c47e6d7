"""Counts what a GPU would be asked to launch, and where the host would wait for it, while the work runs on a CPU.

A *launch* is an operator of ATen that reaches the dispatcher and would start a kernel: all but views, allocation and
metadata. A `_foreach_` or `_fused_` operator is one. A *wait* is what would stop the host until the GPU has done its
work: a number read back, a result whose size depends on contents, a check of contents by a library, a tensor made from
a Python list or number (also one assigned to elements of a tensor: `fill_` has none), and a blocking copy between
devices. Composite operators count by their parts.

The project's own operators (`mixcl_dist::`) are counted as a GPU would run them: their body runs on meta tensors, which
takes the branches of a GPU and computes nothing, and each Triton kernel launched there is one.

This is a proxy. A sort is one operator and several kernels on a card, a convolution's backward is one and two or three,
an empty tensor launches nothing but counts; copies of results to the host by `.cpu()` are not seen where all lies on
the host already. It is exact in what it is for: the same code gives the same counts on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import KernelInterface

#: No kernel: allocation, metadata, and numbers that PyTorch wraps and keeps on the host.
QUIET = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
    "squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "detach_", "resize_", "set_", "scalar_tensor",
    "is_same_size", "record_stream", "is_pinned", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset",
}  # fmt: skip
#: Neither view by its schema nor new memory: what was given is given back.
SAME_MEMORY = {"_unsafe_view", "_reshape_alias", "lift_fresh"}
#: No kernel either, but a copy to or from the host, which waits.
READ_OR_LIFTED = {"_local_scalar_dense", "lift_fresh", "_linalg_check_errors"}
#: Kernels whose result has a size, or is checked, by contents.
SYNCHRONISING = {
    "nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount", "equal",
    "_linalg_svd", "_linalg_eigh", "linalg_lstsq",
}  # fmt: skip


class Total(NamedTuple):
    launches: int
    waits: int
    bytes: int


class LaunchCounter(TorchDispatchMode):
    """Counts within its `with` block, by stage and operator.

    `launches` and `waits` map (stage, operator) to a number, `bytes` to the size of the memory that was newly taken,
    whether or not it was given back; `stage` names what its block belongs to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stage = ""
        self.launches: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer, self._stage = self._stage, name
        try:
            yield
        finally:
            self._stage = outer

    def total(self, *stages: str) -> Total:
        """Of some stages, without any of all."""
        return Total(
            *(
                sum(number for (stage, _), number in found.items() if not stages or stage in stages)
                for found in (self.launches, self.waits, self.bytes)
            )
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mixcl_dist":
            self._look_inside(func, args, kwargs)
        elif func.namespace == "aten":
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._count(func, args, kwargs)
            return self._weighed(func, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _weighed(self, func: torch._ops.OpOverload, result: Any) -> Any:
        """The result, whose memory is counted if it is new."""
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or func._schema.is_mutable or name in SAME_MEMORY):
            made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
            self.bytes[self._stage, name] += sum(one.nbytes for one in made)
        return result

    def _count(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        name = func._schema.name.partition("::")[2]
        if name in READ_OR_LIFTED:
            self.waits[self._stage, name] += 1
            return
        if func.is_view or name in QUIET:
            return
        self.launches[self._stage, name] += 1
        if name in SYNCHRONISING or _depends_on_contents(name, args, kwargs) or _blocks(name, func, args, kwargs):
            self.waits[self._stage, name] += 1

    def _look_inside(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        body = torch._C.DispatchKey.CompositeExplicitAutograd
        with mock.patch.object(KernelInterface, "__getitem__", self._launch), self:
            func._op_dk(body, *args, **kwargs)

    def _launch(self, *_grid: Any) -> Any:
        def launch(*_args: Any, **_options: Any) -> None:
            self.launches[self._stage, "triton"] += 1

        return launch


def _depends_on_contents(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a mask decides the shape of what is read or written, or a tensor that of what is repeated."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name not in ("index", "index_put", "index_put_", "_unsafe_index_put"):
        return False
    masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masked and (name == "index" or args[2].numel() != 1)  # one number is filled in without counting


def _blocks(name: str, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    """Whether a copy crosses between devices and the host waits for it."""
    if name not in ("_to_copy", "copy_"):
        return False
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    target = given.get("device") or args[0].device
    source = args[1].device if name == "copy_" else args[0].device
    return torch.device(target).type != source.type and not given.get("non_blocking")
