"""`make check` holds the house: what would break it is planted in a copy, and lint-imports refuses it by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of what lint-imports reads, links as links."""
    for name in ("mixcl_dist", "kernels", "data_shards", "cluster"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(house: Path) -> tuple[int, str]:
    program = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = os.environ | {"PYTHONPATH": str(house), "COLUMNS": "500"}
    command = [sys.executable, "-c", program, "--no-cache"]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def plant(path: Path, line: str) -> None:
    path.write_text((path.read_text() if path.exists() else "") + f"\n\n{line}\n")


def test_the_house_as_it_is_passes(house):
    code, said = lint(house)
    assert code == 0, said


def test_a_circle_is_refused_also_within_a_function(house):
    plant(house / "data_shards/storage/store.py", "def late():\n    import mixcl_dist.data_shards.storage.folder")
    code, said = lint(house)
    assert code == 1 and "No circle, in any room, also among imports in functions and for types BROKEN" in said


def test_torch_is_refused_in_the_format_of_shards(house):
    plant(house / "data_shards/format/codec.py", "import torch")
    code, said = lint(house)
    assert code == 1 and "torch is in data_shards for the stream alone BROKEN" in said
    assert "mixcl_dist.data_shards.format.codec -> torch" in said


@pytest.mark.parametrize("room", ["mixcl_dist", "mixcl_dist/pretraining", "data_shards", "kernels", "cluster"])
def test_a_module_that_no_layer_names_is_refused(house, room):
    plant(house / room / "unnamed.py", '"""Nobody said where this belongs."""')
    code, said = lint(house)
    assert code == 1 and "unnamed" in said
