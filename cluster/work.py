"""Independent pieces of work on a Ray cluster: run a given function on each, and tell of those whose worker died."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixcl_dist.cluster.ray import check_shared, connection

AHEAD = 2
"""Pieces handed out for each core, so that none waits for the next; more would only pile up."""


@contextmanager
def on_ray(address: str, *, written: Path, read: Sequence[Path]) -> Iterator[Callable[..., Iterator[tuple]]]:
    """A function `run(work, items)` that yields, as each ends, (item, `work(item)`, None), on the cluster at `address`.

    Where the process or the machine that worked on an item was lost twice, it yields (item, None, how). What `work`
    raises comes out. `address` is "auto", "host:port", or "local" for a Ray of one's own.

    Every machine must see the folder `written` and the paths `read` as this one does, on a shared file system: raises
    `RayError`, with the machine's name, where one does not.
    """
    with connection(address, option="--ray"):
        check_shared(Path(written), read)
        yield _run


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
