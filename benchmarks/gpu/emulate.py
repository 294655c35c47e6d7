"""Run the whole queue as on a bare GPU machine, but without a GPU: smallest sizes, kernels in Triton's interpreter.

    make gpu-emulate

In a scratch folder with what would travel there, the pack and the repository, and by the Python of an environment that
has what such a machine has. The first run is killed in the middle; the second has to go on where it ended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pack
import stages

sys.path.insert(0, str(pack.ROOT))

# isort: split
from mixcl_dist.studies import ledger
from mixcl_dist.studies.table import programs

CUT_AFTER = 4  #: items, which is within the third stage


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        machine = Path(folder)
        travel(machine / "repository")
        command = [
            options.python, "benchmarks/gpu/run.py", *options.stages, "--tiny", "--seconds", str(options.seconds),
            "--out", str(options.out.resolve()), "--work", str(machine / "work"),
        ]  # fmt: skip
        shutil.rmtree(options.out, ignore_errors=True)
        before = cut(command, machine / "repository", options.out / "ledger.jsonl")
        print(f"killed after {time.monotonic() - begin:.0f} s, {len(before)} items recorded; going on", flush=True)
        code = subprocess.run(command, cwd=machine / "repository", env=environment()).returncode
    after = list(ledger.read(options.out / "ledger.jsonl"))
    print(f"{time.monotonic() - begin:.0f} s in all, {len(after)} items recorded")
    done = [record["item"] for record in after if record["status"] == "done"]
    if after[: len(before)] != before or len(set(done)) != len(done):
        sys.exit("an item was measured twice, or its record was lost")
    return code


def travel(to: Path) -> None:
    """Lay out what a bare machine is given: the repository's files and the pack."""
    for path in [*pack.repository(), *pack.files_in(pack.ROOT / ".pack")]:
        copy = to / path.relative_to(pack.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy, follow_symlinks=False)


def cut(command: list[str], root: Path, recorded: Path) -> list[dict]:
    """Kill a run once some items are recorded; returns their records."""
    process = subprocess.Popen(command, cwd=root, env=environment(), start_new_session=True)
    while process.poll() is None and len(list(ledger.read(recorded))) < CUT_AFTER:
        time.sleep(0.2)
    programs.kill(process)
    process.wait()
    return list(ledger.read(recorded))


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=list(stages.NAMES), metavar="STAGE", help="(all)")
    python = pack.ROOT / ".venv-gpu" / "bin" / "python"
    parser.add_argument("--python", default=str(python), help="of such a machine (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-emulated"), help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=1800, help="for each of the two runs (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
