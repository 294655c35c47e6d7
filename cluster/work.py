"""Independent pieces of work on a Ray cluster: run a given function on each, and tell of those whose worker died."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AHEAD = 2
"""Pieces handed out for each core, so that none waits for the next; more would only pile up."""


class WorkError(ValueError):
    """A cluster on which the work cannot be done; the message is one line with the cure."""


@contextmanager
def on_ray(address: str, *, written: Path, read: Sequence[Path]) -> Iterator[Callable[..., Iterator[tuple]]]:
    """A function `run(work, items)` that yields, as each ends, (item, `work(item)`, None), on the cluster at `address`.

    Where the process or the machine that worked on an item was lost twice, it yields (item, None, how). What `work`
    raises comes out. `address` is "auto", "host:port", or "local" for a Ray of one's own.

    Every machine must see the folder `written` and the paths `read` as this one does, on a shared file system: raises
    `WorkError`, with the machine's name, where one does not.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a hospital's archive is sent anywhere
    import ray

    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        if address not in ("auto", "local"):  # Ray would look for a silent one for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError) as error:
        raise WorkError(f"--ray {address}: {error}; start Ray there, or leave --ray out") from None
    try:
        _check_shared(Path(written), read)
        yield _run
    finally:
        ray.shutdown()


def _run(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple]:
    import ray

    # An item whose worker is lost is tried again here: Ray would do so without telling.
    remote = ray.remote(num_cpus=1, max_retries=0)(_call)
    shared = ray.put(work)
    waiting = deque((item, False) for item in items)
    in_hand: dict[Any, tuple[Any, bool]] = {}
    while waiting or in_hand:
        limit = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting and len(in_hand) < limit:
            item, again = waiting.popleft()
            in_hand[remote.remote(shared, item)] = item, again
        done, _ = ray.wait(list(in_hand), num_returns=1)
        item, again = in_hand.pop(done[0])
        try:
            yield item, ray.get(done[0]), None
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError as lost:
            if again:
                yield item, None, _how(lost)
            else:
                waiting.appendleft((item, True))


def _call(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)


def _how(lost: Exception) -> str:
    kinds = {"OutOfMemoryError": "out of memory", "NodeDiedError": "its machine was lost"}
    return kinds.get(type(lost).__name__, "a fault in a decoder, or killed")


def _check_shared(written: Path, read: Sequence[Path]) -> None:
    """Raise `WorkError` unless every machine sees a file that this one writes, and all of `read`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    written.mkdir(parents=True, exist_ok=True)
    probe, token = written / f".probe-{secrets.token_hex(4)}", secrets.token_hex(16)
    probe.write_text(token)
    try:
        look = ray.remote(num_cpus=0)(_unseen)
        paths = [str(Path(path).resolve()) for path in read]
        for node in (node for node in ray.nodes() if node["Alive"]):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            unseen = ray.get(look.options(scheduling_strategy=there).remote(str(probe.resolve()), token, paths))
            if unseen:
                where = node["NodeManagerHostname"]
                cure = "give paths on a file system that all machines share"
                raise WorkError(f"{unseen}: is not the same on machine {where}; {cure}")
    finally:
        probe.unlink(missing_ok=True)


def _unseen(probe: str, token: str, read: Sequence[str]) -> str | None:
    """The first path that cannot be used on this machine."""
    if not os.path.exists(probe) or Path(probe).read_text() != token or not os.access(os.path.dirname(probe), os.W_OK):
        return os.path.dirname(probe)
    return next((path for path in read if not os.path.exists(path)), None)
