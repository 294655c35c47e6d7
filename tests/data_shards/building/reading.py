"""What the tests of builds read, and how they start one in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import webdataset as wds

from mixcl_dist.data_shards.format.codec import decode


def samples_of(shards: Path) -> list[dict]:
    """All samples as plain webdataset reads them, payloads decoded."""
    samples = []
    for sample in wds.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False):
        meta = json.loads(sample["json"])
        for member, dtype in meta["dtype"].items():
            meta[member] = decode(sample[member], meta["shape"], dtype, member)
        samples.append({"key": sample["__key__"], "shard": Path(sample["__url__"]).name} | meta)
    return samples


def published(shards: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}


# Children of a spawning process import its main module: what the script patches holds in the workers as well.
SCRIPT = """
    import multiprocessing, os, signal, sys, time
    from pathlib import Path
    from mixcl_dist.data_shards.building import spool
    from mixcl_dist.data_shards.building.settings import BuildConfig
    from mixcl_dist.data_shards.building.build import build
    {patch}
    if __name__ == "__main__":
        result = build([Path(sys.argv[1])], Path(sys.argv[2]), BuildConfig(
            patch_size=(16, 16, 16), samples_per_shard=10, min_body_fraction=0.2, workers=int(sys.argv[3])))
        print(*result.quarantined, sep="\\n")
"""


def script(folder: Path, patch: str = "") -> Path:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(SCRIPT).format(patch=textwrap.dedent(patch)))
    return path


STANDS_STILL = """
    sync, came = os.fsync, []
    def sync_or_stand_still(file):
        out = Path(sys.argv[2])
        if not came and ({moment}):
            came.append(True)
            builder = multiprocessing.parent_process() or multiprocessing.current_process()
            for process in {{builder.pid: "first", os.getpid(): "then"}}:
                os.kill(process, signal.SIGSTOP)
        sync(file)
    os.fsync = sync_or_stand_still
"""


def begin(folder: Path, source: Path, out: Path, workers: int, moment: str) -> subprocess.Popen:
    """A build that stands still, as does the worker that came upon it, at the `moment`, an expression of `out`.

    It is looked for whenever something is about to be on disk, by whoever has written it: none is missed.
    """
    stops = script(folder, textwrap.dedent(STANDS_STILL).format(moment=moment))
    process = subprocess.Popen([sys.executable, stops, source, out, str(workers)])
    while _state(process.pid) != "T":
        assert process.poll() is None, f"never: {moment}"
        time.sleep(0.01)
    return process


def kill(process: subprocess.Popen) -> None:
    """Kill a build, and the worker that stands still with it; the others end by themselves."""
    workers = _workers(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while left := [worker for worker in workers if _state(worker) not in ("", "Z")]:
        assert time.monotonic() < deadline, "workers outlive a killed build"
        for worker in left:
            if _state(worker) == "T":
                os.kill(int(worker), signal.SIGKILL)
        time.sleep(0.02)


def finish(process: subprocess.Popen) -> int:
    """Let a build that stands still go on to its end; its exit code."""
    while process.poll() is None:
        for each in (str(process.pid), *_workers(process)):
            if _state(each) == "T":
                os.kill(int(each), signal.SIGCONT)
        time.sleep(0.02)
    return process.returncode


def _workers(process: subprocess.Popen) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def _state(pid: int | str) -> str:
    """As ps shows it; "" of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
