"""How the ranks of a group meet, compare what they were started with, and tell of one that they have lost."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from mixcl_dist.cluster.errors import EngineError
from mixcl_dist.cluster.group import Group, ToldError, told_by_first
from mixcl_dist.cluster.watchdog import CURE, Watchdog

LATER_S = 30.0
"""By which collectives wait longer than the watchdog, which knows more."""


def set_environment(group: Group) -> None:
    """Describe the group as torch and DeepSpeed read it; DeepSpeed would look for MPI otherwise."""
    import torch

    # srun may show each process one GPU alone, which is then number 0 for all of them.
    devices = torch.accelerator.device_count() or group.local_rank + 1
    names = {
        "RANK": group.rank,
        "LOCAL_RANK": group.local_rank % devices,
        "WORLD_SIZE": group.world_size,
        "MASTER_ADDR": group.address,
        "MASTER_PORT": group.port,
    }
    os.environ.update({name: str(value) for name, value in names.items() if value is not None})


def meet_nobody(backend: str) -> None:
    """Make a group of this process alone; without a port, which another one might take before it is listened at."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def compare(common: Mapping[str, Any], group: Group) -> None:
    """Raise `EngineError` on every rank where one has been started with other settings than rank 0."""
    if group.world_size == 1:
        return
    first, *others = gather(dict(common), group.world_size)
    for rank, theirs in enumerate(others, 1):
        if names := sorted(name for name in first | theirs if first.get(name) != theirs.get(name)):
            shown = [f"{name} ({first.get(name)} and {theirs.get(name)})" for name in names[:3]]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            cure = "start all ranks with the same command and the same installation"
            problem = f"ranks 0 and {rank} differ in {', '.join(shown)}{more}; {cure}"
            raise told_by_first(EngineError(problem), group.rank)


def gather(value: Any, world_size: int) -> list[Any]:
    """Of every rank its value, as JSON: what a peer sends is never unpickled."""
    import torch
    from torch import distributed

    if world_size == 1:
        return [json.loads(json.dumps(value))]
    device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    distributed.all_gather(sizes, torch.tensor([len(content)], device=device))
    longest = max(map(int, sizes))
    contents = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world_size)]
    distributed.all_gather(contents, torch.nn.functional.pad(content, (0, longest - len(content))))
    return [json.loads(row[:size].cpu().numpy().tobytes()) for row, size in zip(contents, sizes, strict=True)]


@contextmanager
def lost_ranks(timeout_s: float, watchdog: Watchdog | None = None) -> Iterator[None]:
    """Turn what torch raises where another rank has died or does not answer into one line, told by one rank."""
    from torch import distributed

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, distributed.DistError) and not any(word in text for word in ("gloo", "NCCL")):
            raise
        if watchdog is None:
            raise EngineError(f"{_reason(text, timeout_s)}; {CURE}") from None
        line = watchdog.blame(_reason(text, timeout_s))
        raise (EngineError(line) if watchdog.claim() else ToldError(line)) from None


def _reason(text: str, timeout_s: float) -> str:
    if "EADDRINUSE" in text:
        return f"MASTER_PORT {os.environ['MASTER_PORT']} is taken on this machine; set it to another"
    ended = "onnection" in text and "imed out" not in text
    what = "has ended" if ended else f"did not answer within engine.timeout_s, {timeout_s:g} s"
    return f"another rank {what}; see what it says"


def watched(group: Group, timeout_s: float, stacks: Path | None) -> Watchdog:
    from torch.distributed import PrefixStore, distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    # torchrun keeps its store for the next start, too.
    start = gather(secrets.token_hex(8), group.world_size)[0]
    own = PrefixStore(f"watchdog {start}", store.clone())  # with a connection of its own
    host = socket.gethostname()
    return Watchdog(own, group.rank, group.world_size, host=host, hung_s=timeout_s, stacks=stacks)


def group_of_hosts(timeout_s: float) -> Any:
    """For words between the processes of all ranks, whatever their devices do."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def limit_waits(timeout_s: float) -> None:
    """Let the groups that DeepSpeed made for itself wait no longer than the first one."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
