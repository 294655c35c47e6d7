"""Programs that are started side by side and never outlive the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def start(
    command: Sequence[str], *, environment: Mapping[str, str], output: int | IO[str], folder: Path | None = None
) -> subprocess.Popen:
    """Start a program in a group of its own, both its streams in `output` (a file, or `subprocess.PIPE`).

    On Linux the kernel kills it where this process is killed, so that nothing runs on unseen. Raises `OSError`.
    """
    return subprocess.Popen(
        command, cwd=folder, env=dict(environment), text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=output, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
    )  # fmt: skip


def kill(process: subprocess.Popen) -> None:
    """End a program and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def last_line(log: Path) -> str:
    """What a program said last, at most 300 characters; empty where it said nothing."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[-300:] if lines else ""


def _die_with_parent() -> None:
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
