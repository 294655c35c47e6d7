"""Programs that run as the ranks of one group, over gloo on this machine.

Each ends by `mixcl_dist.cluster.group.leave` or `os._exit`: a group that is open when the interpreter is torn down may
end it by SIGABRT."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from ..ports import free_port


def start(program: Sequence[str], ranks: int, **environment: str) -> list[subprocess.Popen]:
    """The processes of `python program`, rank by rank; `environment` is added to each one's."""
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group["OMP_NUM_THREADS"] = "1"
    return [
        subprocess.Popen(
            [sys.executable, *map(str, program)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 500) -> list[tuple[int, str, str]]:
    """Exit code, output and error output of each."""
    ended = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=timeout)
            ended.append((process.returncode, output, errors))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return ended
