"""A contestant in processes of its own, frozen unless it is asked for something."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field


class ContestantError(RuntimeError):
    """A contestant that ended or delivers something else."""


@dataclass
class Process:
    """A contestant and its workers, frozen unless it is asked for something."""

    name: str
    command: list[str]
    errors: object = field(default_factory=tempfile.TemporaryFile)

    def __post_init__(self) -> None:
        # A session of its own, so that one signal reaches the workers, too.
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )

    def ask(self, command: str) -> object:
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        self._signal(signal.SIGSTOP)
        if not answer:
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").strip().splitlines() or ["ended without a word"]
            raise ContestantError(lines[-1])
        return json.loads(answer)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(10)
            time.sleep(0.2)  # for Python's own tracker of shared memory to clean up
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
