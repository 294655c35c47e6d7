"""Every example runs as its first line says, and leaves what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LEAVES = {
    "pretrain_and_finetune.py": ("few/dice.json", "scratch/dice.json"),
    "own_recipe.sh": ("few/dice.json",),
    "own_source.py": ("shards/manifest.json",),
}


def test_every_example_is_run_and_listed():
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert files == set(LEAVES)
    assert all(f"`{name} OUT`" in (EXAMPLES / "README.md").read_text() for name in files)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAVES)
def test_it_runs(name, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "python").symlink_to(sys.executable)
    (commands / "mixcl").write_text(f'#!/bin/sh\nexec {sys.executable} -m mixcl_dist "$@"\n')
    (commands / "mixcl").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path]),
    }
    interpreter = [sys.executable] if name.endswith(".py") else ["bash"]
    done = subprocess.run(
        [*interpreter, EXAMPLES / name, tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for left in LEAVES[name]:
        assert (tmp_path / "out" / left).exists(), done.stdout
