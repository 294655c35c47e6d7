"""What is committed beside the code: one version, results without a machine's paths, files that other tools read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mixcl_dist

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".csv", ".json", ".jsonl", ".md", ".txt", ".yaml"}
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:[\w.+-]+/)+[\w.+-]+")


def test_the_version_stands_in_one_place_and_the_citation_says_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mixcl_dist.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mixcl_dist.__version__


def test_committed_results_hold_no_path_of_a_machine():
    files = [path for path in (ROOT / "benchmarks" / "results").rglob("*") if path.suffix in TEXT]
    found = {path.name: MACHINE_PATH.findall(path.read_text()) for path in files}
    assert files and {name: paths for name, paths in found.items() if paths} == {}


@pytest.mark.parametrize("line", ["data: /home/me/openkbp", "[/work/runs/a.json]", '"/tmp/x/y"'])
def test_such_a_path_would_be_found(line):
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize("line", ["12 steps/s", "runs/a/b", "https://arxiv.org/abs/1", "1/2/3", "and/or"])
def test_what_only_looks_like_one_is_not(line):
    assert not MACHINE_PATH.search(line)


def test_the_pre_commit_hooks_use_the_linter_that_is_pinned():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {repo["repo"].rsplit("/", 1)[1]: repo["rev"] for repo in repos}
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and revisions["ruff-pre-commit"] == f"v{pinned[1]}"
    hooks = {hook["id"] for repo in repos for hook in repo["hooks"]}
    assert hooks == {"ruff-check", "ruff-format", "check-symlinks", "destroyed-symlinks"}


def test_forms_ask_for_what_a_maintainer_needs():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/defect.yml").read_text())
    labels = [part["attributes"].get("label", "") for part in form["body"]]
    assert any("mixcl doctor" in label for label in labels) and any("run.json" in label for label in labels)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["run"]["steps"]]
