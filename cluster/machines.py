"""Are the machines of a group fit to train together? Each finding is measured, by all of them at once."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixcl_dist.cluster.doctor import PACKAGES, Finding, version_of
from mixcl_dist.cluster.group import Group, GroupError, check_address, described
from mixcl_dist.cluster.meeting import LATER_S

if TYPE_CHECKING:
    import torch

MEETING_S = 60.0
"""Seconds that ranks may take to find each other."""
ROUNDS = 5
SLOW = 0.5
"""Share of the median below which a pair of machines, or one machine's reading, is told to be slow."""
MAX_SKEW_S = 1.0
"""More would let files of one machine seem to be from another's future."""
SHARED_MEMORY_BYTES, DISK_BYTES = 2**28, 2**30
"""Least that is to be free on each machine: loader workers pass batches through the former."""


@dataclass(frozen=True)
class Peers:
    """The ranks of a group that has met."""

    group: Group
    machines: Mapping[str, list[int]]
    """Name → its ranks."""
    device: torch.device
    store: Any
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its machine, which measures for all of it."""
        return any(ranks[0] == self.group.rank for ranks in self.machines.values())

    def tell(self, value: Any) -> list[Any]:
        """Of every rank its value, as JSON: what a peer sends is never unpickled."""
        return _tell(self.store, self.group, f"tell/{next(self._calls)}", value)

    def of_machines(self, values: Sequence[Any]) -> dict[str, Any]:
        """Of the values of all ranks those of each machine's first."""
        return {name: values[ranks[0]] for name, ranks in self.machines.items()}


def examine_machines(
    read_rate: Callable[[int, int], float] | None = None, *, timeout_s: float = 600.0
) -> list[Finding]:
    """What all ranks of this process's group find together; the same list on every one, which must all call.

    `read_rate` (part, parts) reads some of the data and returns bytes a second; `timeout_s` is the engine's. Raises
    `GroupError` where the group does not meet.
    """
    with _met() as peers:
        checks: dict[str, Callable[[Peers], tuple[bool, str]]] = {
            "machines": _machines,
            "versions": _versions,
            "devices": _devices,
            "clocks": _clocks,
            "all-reduce": _all_reduce,
            "latency": _latency,
            "/dev/shm": lambda peers: _room(peers, Path("/dev/shm"), SHARED_MEMORY_BYTES, "docker run --ipc=host"),
            "disk": lambda peers: _room(peers, Path.cwd(), DISK_BYTES, "start from a folder with room"),
            "shared folder": _shared_folder,
            "time-outs": lambda peers: _time_outs(peers, timeout_s),
        }
        if read_rate is not None:
            checks["shards"] = lambda peers: _reading(peers, read_rate)
        findings = {name: check(peers) for name, check in checks.items()}
        return [Finding(name, fit, detail) for name, (fit, detail) in peers.tell(findings)[0].items()]


@contextmanager
def _met() -> Iterator[Peers]:
    import torch
    from torch import distributed

    group = described()
    if group.world_size == 1:
        raise GroupError(
            "--cluster looks at several processes, and this is one; start it with torchrun, srun or mpirun"
        )
    check_address(group)
    names = {"RANK": group.rank, "WORLD_SIZE": group.world_size, "MASTER_ADDR": group.address}
    os.environ.update({name: str(value) for name, value in (names | {"MASTER_PORT": group.port}).items()})
    cuda = torch.cuda.is_available()
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=MEETING_S))
    except (distributed.DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            raise GroupError(f"MASTER_PORT {group.port} is taken on this machine; set it to another") from None
        where = f"rank 0 at {group.address}:{group.port}"
        cure = "see whether all ranks were started, and that no firewall lies between"
        raise GroupError(f"not all ranks met {where} within {MEETING_S:g} s; {cure}") from None
    try:
        store = distributed.distributed_c10d._get_default_store()
        machines: dict[str, list[int]] = {}
        for rank, name in enumerate(_tell(store, group, "machine", _machine_name())):
            machines.setdefault(name, []).append(rank)
        if cuda:
            torch.cuda.set_device(group.local_rank % torch.cuda.device_count())
        yield Peers(group, machines, torch.device("cuda" if cuda else "cpu"), store)
        distributed.barrier()  # rank 0 holds the store until nobody reads it any more
    finally:
        distributed.destroy_process_group()


def _machine_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _tell(store: Any, group: Group, key: str, value: Any) -> list[Any]:
    store.set(f"doctor/{key}/{group.rank}", json.dumps(value))
    return [json.loads(store.get(f"doctor/{key}/{rank}")) for rank in range(group.world_size)]


def _machines(peers: Peers) -> tuple[bool, str]:
    counts = {len(ranks) for ranks in peers.machines.values()}
    size = f"{peers.group.world_size} ranks on {_count(len(peers.machines), 'machine')}: {_listed(peers.machines)}"
    if len(counts) > 1:
        told = ", ".join(f"{len(ranks)} on {name}" for name, ranks in peers.machines.items())
        return False, f"{size}; not alike ({told}): start as many on each"
    return True, size


def _versions(peers: Peers) -> tuple[bool, str]:
    import torch

    ours = {name: version_of(name) for name in ("mixcl-dist", *PACKAGES)} | {"cuda": torch.version.cuda}
    if torch.cuda.is_available():
        ours["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return _alike(peers, ours, "install the same on all machines")


def _devices(peers: Peers) -> tuple[bool, str]:
    import torch

    count = torch.cuda.device_count()
    device = torch.cuda.get_device_name() if count else torch.backends.cpu.get_cpu_capability()
    ours = {"GPUs": count, "cores": len(os.sched_getaffinity(0)), "device": device}
    found = peers.of_machines(peers.tell(ours))
    for name, ranks in peers.machines.items():
        if 0 < found[name]["GPUs"] < len(ranks):
            return False, f"{name} has {found[name]['GPUs']} GPUs for {len(ranks)} ranks; start one rank for each GPU"
    return _alike(peers, ours, "steps take as long as the slowest device; ask for machines that are alike")


def _alike(peers: Peers, ours: Mapping[str, Any], cure: str) -> tuple[bool, str]:
    found = peers.of_machines(peers.tell(ours))
    first, *others = found
    for other in others:
        if differing := sorted(name for name in ours if found[other].get(name) != found[first].get(name)):
            told = [
                f"{name} {found[first].get(name)} on {first}, {found[other].get(name)} on {other}" for name in differing
            ]
            return False, f"{'; '.join(told)}: {cure}"
    return True, ", ".join(f"{name} {value}" for name, value in found[first].items() if value is not None)


def _clocks(peers: Peers) -> tuple[bool, str]:
    """How far each machine's clock is from rank 0's, by the quickest of some round trips."""
    offsets = {}
    for name, ranks in itertools.islice(peers.machines.items(), 1, None):
        offsets[name] = min(_round_trip(peers, ranks[0]) for _ in range(ROUNDS))[1]
    offsets = peers.tell(offsets)[0]
    worst = max(offsets, key=lambda name: abs(offsets[name]), default=None)
    if worst is None:
        return True, "one machine, one clock"
    apart = f"{worst} is {abs(offsets[worst]):.3f} s {'ahead of' if offsets[worst] > 0 else 'behind'} rank 0's machine"
    if abs(offsets[worst]) > MAX_SKEW_S:
        return False, f"{apart}; let chronyd or ntpd set the clocks of both"
    return True, f"{apart}, the most of all"


def _round_trip(peers: Peers, other: int) -> tuple[float, float]:
    """On rank 0: seconds of one, and how far the other's clock is ahead."""
    import torch
    from torch import distributed

    theirs, rank = torch.zeros(1, dtype=torch.float64), peers.group.rank
    begin, sent = time.monotonic(), time.time()
    if rank == 0:
        distributed.send(torch.zeros(1), other)
        distributed.recv(theirs, other)
    elif rank == other:
        distributed.recv(torch.zeros(1), 0)
        distributed.send(torch.tensor([time.time()], dtype=torch.float64), 0)
    took = time.monotonic() - begin
    return took, float(theirs) - (sent + took / 2)


def _all_reduce(peers: Peers) -> tuple[bool, str]:
    """GB/s of the all-reduce of each pair of machines, disjoint pairs at once, and of all ranks."""
    from torch import distributed

    size = 2**26 if peers.device.type == "cuda" else 2**23
    whole = statistics.median(peers.tell(size / _seconds_of_all_reduce(peers, distributed.group.WORLD, size)))
    told = f"of {size / 2**20:g} MiB: all ranks {_rate(whole)}"
    firsts = {ranks[0]: name for name, ranks in peers.machines.items()}
    rates: dict[str, float] = {}
    for pairs in rounds_of_pairs(list(firsts)):
        for pair in pairs:
            if peers.group.rank in pair:
                group = distributed.new_group(sorted(pair), use_local_synchronization=True)
                rate = size / _seconds_of_all_reduce(peers, group, size)
                rates["–".join(firsts[rank] for rank in sorted(pair))] = rate
        distributed.barrier()
    rates = {pair: rate for found in peers.tell(rates) for pair, rate in found.items()}
    if not rates:
        return True, told
    return _slowest(rates, f"{told}, pairs", "look at its cables, and at NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME")


def rounds_of_pairs(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair of members once, in rounds in each of which a member is in one pair at most."""
    seats: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(one, other) for one, other in facing if one is not None and other is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def _seconds_of_all_reduce(peers: Peers, group: Any, size: int) -> float:
    import torch
    from torch import distributed

    values, times = torch.ones(max(1, size // 4), device=peers.device), []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        distributed.all_reduce(values, group=group)
        values[0].item()  # waits for a GPU
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _latency(peers: Peers) -> tuple[bool, str]:
    from torch import distributed

    seconds = max(peers.tell(_seconds_of_all_reduce(peers, distributed.group.WORLD, 4)))
    return True, f"an all-reduce of one number takes {seconds * 1e6:.0f} µs, of which a step has some tens"


def _reading(peers: Peers, read_rate: Callable[[int, int], float]) -> tuple[bool, str]:
    """Bytes a second of each machine, all at once."""
    rate, problem = 0.0, ""
    if peers.leads:
        try:
            rate = read_rate(list(peers.machines).index(_machine_name()), len(peers.machines))
        except (ValueError, OSError) as error:
            problem = " ".join(str(error).split())
    found = peers.of_machines(peers.tell([rate, problem]))
    if failed := [f"on {name}: {problem}" for name, (_, problem) in found.items() if problem]:
        return False, failed[0]
    rates = {name: rate for name, (rate, _) in found.items()}
    return _slowest(rates, "one reader on each machine", "see how it mounts the shards")


def _slowest(rates: Mapping[str, float], what: str, cure: str) -> tuple[bool, str]:
    median, slowest = statistics.median(rates.values()), min(rates, key=lambda name: rates[name])
    told = f"{what} {_rate(median)}, the slowest {slowest} {_rate(rates[slowest])}"
    return (True, told) if rates[slowest] >= SLOW * median else (False, f"{told}; {cure}")


def _room(peers: Peers, folder: Path, needed: int, cure: str) -> tuple[bool, str]:
    free = peers.of_machines(peers.tell(shutil.disk_usage(folder).free if folder.exists() else 0))
    least = min(free, key=lambda name: free[name])
    told = f"{free[least] / 2**30:.1f} GiB free in {folder} of {least}, the least"
    return (True, told) if free[least] >= needed else (False, f"{told}; {needed / 2**30:g} are needed: {cure}")


def _shared_folder(peers: Peers) -> tuple[bool, str]:
    """Whether all machines see what rank 0 writes where they were started, as they must see a run."""
    probe = Path.cwd() / ".mixcl-doctor"
    if peers.group.rank == 0:
        probe.touch()
    peers.tell(None)
    seen = peers.of_machines(peers.tell(probe.exists()))
    peers.tell(None)
    if peers.group.rank == 0:
        probe.unlink(missing_ok=True)
    if unseen := [name for name, there in seen.items() if not there]:
        return (
            False,
            f"{_listed(unseen)} does not see {probe.parent} of rank 0; runs must lie where all machines see them",
        )
    return True, f"all machines see {probe.parent}"


def _time_outs(peers: Peers, timeout_s: float) -> tuple[bool, str]:
    end = os.environ.get("SLURM_JOB_END_TIME")
    left = max(0.0, float(end) - time.time()) if end else None
    engine = {"store": timeout_s, "watchdog": timeout_s, "collective": timeout_s + LATER_S}
    return ladder(engine | {"scheduler": peers.tell(left)[0]})


def ladder(seconds: Mapping[str, float | None]) -> tuple[bool, str]:
    """Whether what waits within something else loses patience first, so that it can say who was missing; None is what
    does not exist here."""
    rungs = [(name, value) for name, value in seconds.items() if value is not None]
    for (inner, shorter), (outer, longer) in itertools.pairwise(rungs):
        if shorter > longer:
            return False, f"{inner} waits {shorter:g} s, {outer} only {longer:g} s; {CURES[outer]}"
    return True, " ≤ ".join(f"{name} {value:g} s" for name, value in rungs)


CURES = {
    "collective": "raise --engine.timeout_s",
    "watchdog": "lower --engine.timeout_s",
    "scheduler": "ask for a longer time, or lower --engine.timeout_s",
}


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.2f} GB/s" if bytes_a_second >= 1e8 else f"{bytes_a_second / 1e6:.1f} MB/s"


def _listed(names: Sequence[str] | Mapping[str, Any], most: int = 4) -> str:
    shown = list(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
