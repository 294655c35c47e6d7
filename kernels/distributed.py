"""Rows of many processes contrasted with each other: every process sweeps its own rows against everyone's columns.

What travels: integers and weights of all rows (gathered), embeddings (gathered, or on a ring), each row's ``lse``
(gathered). A process finishes the whole gradient of its own rows, so no gradient is reduced. Numbers of rows go through
the group's store, as a collective would have to wait for the device to tell them, and could not say who is missing.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

#: Bytes of all processes' embeddings above which they travel on a ring, a block at a time, while the block before is
#: being swept. Below it one gather costs less than the ring's many small sweeps.
RING_ABOVE = 2**29

#: PyTorch 2.13 has renamed it, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Alone:
    """One process: its rows are all there are."""

    size = 1
    own = slice(None)

    def gather(self, values: Tensor) -> Tensor:
        return values

    def sum(self, values: Tensor) -> Tensor:
        return values

    def use_ring(self, embeddings: Tensor) -> bool:
        return False

    def blocks(self, embeddings: Tensor) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), embeddings


class Peers:
    """The processes of a group, at one call of the loss or of its backward that each of them has entered.

    Args:
        group: the process group.
        embeddings: this process's (n, D); n may differ between processes and be 0.
        same: what must be equal on all processes, by name; tensors are 0-d or boolean.

    Raises:
        TimeoutError: on every process, where some did not enter within the group's time-out; it names them.
        ValueError: on every process, where two disagree on an argument; it names both values.
    """

    def __init__(self, group: dist.ProcessGroup, embeddings: Tensor, same: dict[str, object]) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        arguments = {"D": embeddings.shape[1], "dtype": embeddings.dtype, "RING_ABOVE": RING_ABOVE} | same
        header = {"rows": len(embeddings), "same": {name: _describe(value) for name, value in arguments.items()}}
        self.counts = _enter(group, header, _timeout(group, embeddings.device))
        stops = itertools.accumulate(self.counts)
        self.slices = [slice(stop - count, stop) for count, stop in zip(self.counts, stops, strict=True)]
        self.own = self.slices[self.rank]

    def gather(self, values: Tensor) -> Tensor:
        """The (N, …) values of all processes' rows, in the order of ranks, from this process's (n, …)."""
        largest = max(self.counts)
        if len(values) < largest:  # the collective wants equal sizes
            padding = values.new_zeros(largest - len(values), *values.shape[1:])
            values = torch.cat([values, padding])
        gathered = self._all_gather(values)
        if min(self.counts) == largest:
            return gathered.flatten(0, 1)
        return torch.cat([block[:count] for block, count in zip(gathered, self.counts, strict=True)])

    def sum(self, values: Tensor) -> Tensor:
        """Σ over processes, in the order of ranks, so that every process has the same bits."""
        return self._all_gather(values).sum(0)

    def _all_gather(self, values: Tensor) -> Tensor:
        """(size, …) from values of one shape on all processes."""
        sent = _as_bytes(values).flatten()
        gathered = sent.new_empty(self.size * len(sent))
        _all_gather(gathered, sent, group=self.group)
        return gathered.view(values.dtype).view(self.size, *values.shape)

    def use_ring(self, embeddings: Tensor) -> bool:
        return sum(self.counts) * embeddings.shape[1] * embeddings.element_size() > RING_ABOVE

    def blocks(self, embeddings: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Everyone's embeddings, with the rows that they are: all at once, or process by process from a ring."""
        if self.use_ring(embeddings):
            yield from self._ring(embeddings)
        else:
            yield slice(None), self.gather(embeddings)

    def _ring(self, embeddings: Tensor) -> Iterator[tuple[slice, Tensor]]:
        # The first block is the very tensor: pairs of rows with themselves are symmetric, which saves half a sweep.
        block = embeddings
        for hop in range(self.size):
            owner = (self.rank - hop) % self.size
            arriving = block.new_empty(self.counts[owner - 1], block.shape[1])
            transfers = self._pass_on(block, arriving) if hop < self.size - 1 else []
            yield self.slices[owner], block
            for transfer in transfers:
                transfer.wait()
            block = arriving

    def _pass_on(self, block: Tensor, arriving: Tensor) -> list[dist.Work]:
        """Begin to send a block to the next process and to receive the previous one's; both may be empty."""
        transfers = []
        for operation, values, step in ((dist.isend, block, 1), (dist.irecv, arriving, -1)):
            if values.numel():
                peer = dist.get_global_rank(self.group, (self.rank + step) % self.size)
                transfers.append(dist.P2POp(operation, _as_bytes(values), peer, group=self.group))
        return dist.batch_isend_irecv(transfers) if transfers else []


def name_of(group: dist.ProcessGroup | None) -> str:
    """The name under which :func:`join` finds a group; "" where this process is alone.

    Raises:
        ValueError: this process is not in the group.
    """
    if group is None:
        return ""
    if not isinstance(group, dist.ProcessGroup):  # new_group() gives other processes a number
        raise ValueError(f"process_group: expected a group that this process is in, got {group!r}")
    return "" if group.size() == 1 else group.group_name


def join(group_name: str, embeddings: Tensor, same: dict[str, object]) -> Alone | Peers:
    """The processes of the group of this name, entered together, see :class:`Peers`."""
    if not group_name:
        return Alone()
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    return Peers(group, embeddings, same)


def _describe(value: object) -> str:
    """Text that is equal for equal values; of a tensor on a device that would have to be waited for, its shape."""
    if not isinstance(value, Tensor):
        return str(value)
    shape = f"of shape {tuple(value.shape)}"
    if value.device.type != "cpu":
        return shape
    if value.dim() == 0:
        return str(value.item())
    return f"{shape}, checksum {zlib.crc32(bytes(value.flatten().tolist())):x}"


def _as_bytes(values: Tensor) -> Tensor:
    """The same memory where it is contiguous: not every backend takes every dtype."""
    return values.contiguous().view(torch.uint8)


def _timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    # Not that of the group's store, which is the default group's.
    return group._get_backend(device).options._timeout


def _enter(group: dist.ProcessGroup, header: dict, timeout: timedelta) -> list[int]:
    """Every process's number of rows.

    Each puts its header into the store, the first judges them, and all read the one verdict. So all go on or none, also
    one that comes after the others have lost patience, and what they call next fits together again.
    """
    store, rank, size = group.get_group_store(), group.rank(), group.size()
    call = store.add(f"mixed_contrastive/calls/{rank}", 1)
    verdict, *headers = _keys(call, size)
    store.set(headers[rank], json.dumps(header))
    judging = rank == 0
    try:
        store.wait(headers if judging else [verdict], timeout)
    except RuntimeError:  # a time-out, for which not every store has a type of its own
        judging = True
    if judging:
        store.compare_set(verdict, "", json.dumps(_judge(_read(store, headers), timeout)))  # the first one stands
    decided = json.loads(store.get(verdict))
    if message := decided.get("missing"):
        raise TimeoutError(message)
    # All have entered this call, so all have read the verdict of the one before.
    old_verdict, *old_headers = _keys(call - 1, size)
    for key in [old_headers[rank], old_verdict][: 1 + (rank == 0)]:
        store.delete_key(key)
    if message := decided.get("differing"):
        raise ValueError(message)
    return decided["counts"]


def _keys(call: int, size: int) -> list[str]:
    """Where the store has the verdict of a call, and every process's header."""
    return [f"mixed_contrastive/{call}", *(f"mixed_contrastive/{call}/{rank}" for rank in range(size))]


def _read(store: dist.Store, keys: list[str]) -> list[dict | None]:
    """The headers under these keys, None for those that are not there."""
    if store.check(keys):
        return [json.loads(value) for value in store.multi_get(keys)]
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]


def _judge(headers: list[dict | None], timeout: timedelta) -> dict:
    """The numbers of rows, or the message about those who are missing or differ."""
    present = {rank: header for rank, header in enumerate(headers) if header is not None}
    missing = [str(rank) for rank in range(len(headers)) if rank not in present]
    if missing:
        return {
            "missing": f"process_group: waited {timeout} for rank {', '.join(missing)} of {len(headers)} to call "
            "mixed_contrastive_loss or its backward; every rank has to, also one without rows"
        }
    for rank, header in present.items():
        for name, value in header["same"].items():
            first = present[0]["same"][name]
            if value != first:
                return {
                    "differing": f"process_group: {name} is {first} on rank 0 and {value} on rank {rank}, "
                    "and has to be the same on all"
                }
    return {"counts": [header["rows"] for header in present.values()]}
