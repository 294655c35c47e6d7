"""The one door to Ray: a connection for trials, for work and for the doctor, which sends nothing anywhere."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixcl_dist.cluster.errors import ClusterError
from mixcl_dist.cluster.installation import code_digest

ANSWER_S = 10
"""Seconds that a cluster's head may take to accept a connection: Ray would look for a silent one for minutes."""
OBJECT_STORE_BYTES = 100_000_000
"""Of a Ray of one's own, which is handed no arrays."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a hospital's archive is sent anywhere
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials write their own metrics
    "RAY_AIR_NEW_OUTPUT": "0",  # no tables on the terminal
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of the change
}


class RayError(ClusterError):
    """A cluster that cannot be joined, or cannot do what is asked of it; the message is one line with the cure."""


@contextmanager
def connection(
    address: str, *, option: str, cpus: int | None = None, variables: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A connection to Ray, ended afterwards.

    `address` is "auto", "host:port", or "local" for a Ray of one's own with `cpus` cores (None: all). `option` is what
    the user calls the address; `variables` are set in the environment of every worker.
    Raises `RayError` where there is no cluster, or no Ray.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise RayError("Ray is not installed here; pip install 'ray[tune]'") from None

    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        if address not in ("auto", "local"):
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": dict(variables or {})},
            **(own if address == "local" else {}),
        )
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        cure = "here by ray start --head" if address == "auto" else f"there, or leave {option} out"
        raise RayError(f"{option} {address}: {problem}; start Ray {cure}") from None
    try:
        if threading.current_thread() is threading.main_thread():  # Ray's own handler dumps stacks
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        yield
    finally:
        ray.shutdown()


def check_resources(wanted: Mapping[str, tuple[str, float]], *, on_one_machine: bool = False) -> None:
    """Raise `RayError` where what is wanted would be waited for for ever: `wanted` is the option → Ray's name of a
    resource and its amount, of memory in GB; in the whole cluster, or all of it on one machine."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = [{**one, "memory": one.get("memory", 0) / 1e9} for one in machines]
    for option, (name, amount) in wanted.items():
        amounts = [one.get(name, 0) for one in have]
        most = max(amounts, default=0) if on_one_machine else sum(amounts)
        if amount > most:
            who = f"the largest of {len(have)} machines" if on_one_machine and len(have) > 1 else "Ray"
            raise RayError(f"{option} {amount:g}: {who} has {most:g}; lower it or join a larger cluster")
    if on_one_machine and not any(all(one.get(name, 0) >= n for name, n in wanted.values()) for one in have):
        raise RayError(f"{', '.join(wanted)}: no one machine has them together; lower one of them")


def check_shared(written: Path, read: Sequence[Path]) -> None:
    """Raise `RayError` unless every machine has this one's code of this package, and sees what this one writes to
    `written`, a folder, and all of `read`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    written.mkdir(parents=True, exist_ok=True)
    probe, token = written / f".probe-{secrets.token_hex(4)}", secrets.token_hex(16)
    probe.write_text(token)
    try:
        look = ray.remote(num_cpus=0)(_unseen)
        paths = [str(Path(path).resolve()) for path in read]
        for node in (node for node in ray.nodes() if node["Alive"]):
            there: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            unseen, code = ray.get(look.options(scheduling_strategy=there).remote(str(probe.resolve()), token, paths))
            where = node["NodeManagerHostname"]
            if code != code_digest():
                raise RayError(f"machine {where}: has other code of this package; install the same version on all")
            if unseen:
                cure = "give paths on a file system that all machines share"
                raise RayError(f"{unseen}: is not the same on machine {where}; {cure}")
    finally:
        probe.unlink(missing_ok=True)


def _unseen(probe: str, token: str, read: Sequence[str]) -> tuple[str | None, str]:
    """The first path that cannot be used on this machine, and its code."""
    if not os.path.exists(probe) or Path(probe).read_text() != token or not os.access(os.path.dirname(probe), os.W_OK):
        return os.path.dirname(probe), code_digest()
    return next((path for path in read if not os.path.exists(path)), None), code_digest()
