"""Every example runs as its first line says, and leaves what it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "from_openkbp_to_a_report.ipynb"
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


def test_the_notebook_is_committed_without_outputs_and_paths():
    notebook = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert not re.search(r"/(home|work|tmp|Users)/", NOTEBOOK.read_text())
    assert f"`{NOTEBOOK.name}`" in (EXAMPLES / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs_on_real_ct(ct, tmp_path):
    """Its cells are plain Python, so that they run here as they do in Jupyter, one after the other."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    given = {"OPENKBP": str(ct / "openkbp"), "OUT": str(tmp_path / "out"), "MPLBACKEND": "Agg"}
    environment = os.environ | given | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for left in ("few/report/index.html", "predicted/prediction.json", "exported/README.md"):
        assert (tmp_path / "out" / left).is_file(), done.stdout
    assert "Learnt from the labels of 1 scan" in done.stdout
