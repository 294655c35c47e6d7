"""Every command in the documentation is one that the command line takes, with its settings, files and make targets;
those of four guides are run, one after another, on the phantom that the first page makes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mixcl_dist.arguments import parse
from mixcl_dist.cli import _parser
from mixcl_dist.config import from_dict, load

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
RUN = ("cohort", "few-labels", "search", "predict")
"""Pages all of whose commands are run, in this order, but those on data that a test has not."""
NOT_RUN = re.compile(r"openkbp|^cat |others|runs/table")
ELSEWHERE = {"docker", "apptainer", "python3", "mixcl/bin/pip", "cat"}
"""Programs of others, which are taken at their word."""
STARTS = ("make ", "mixcl ")
FENCE = re.compile(r"^(?P<fence>```+)(?P<kind>\w+)\n(?P<body>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
SMALL = shlex.split(
    "--network.filters 4,6,8 --views.size 16,16,16 --rows.per_view_pair 16 --pretrain.steps 2 --pretrain.batch_size 4 "
    "--pretrain.gradient_norms_every 0 --data.workers 0 --checkpoint.every 2"
)
SMALL_TRIAL = shlex.split("--network.filters 4,6,8 --finetune.patch_size 24,24,24 --finetune.steps 2")
ONE_SUBSET = shlex.split("--study.fractions 0.5 --study.seeds 0")
SIZES = {"pretrain": SMALL, "finetune": SMALL_TRIAL, "tune": [*SMALL_TRIAL, *ONE_SUBSET]}
"""What makes a command of a page a matter of seconds: settings given last win."""


@dataclass(frozen=True)
class Block:
    kind: str
    body: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = [Block(fence["kind"], fence["body"]) for fence in FENCE.finditer(text)]
    if page.name == "README.md":  # commands are indented there
        indented = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
        found += [
            Block("sh", textwrap.dedent(body)) for body in indented if body.lstrip().startswith(("make", "mixcl"))
        ]
    return [block for block in found if "--8<--" not in block.body]


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page) if block.kind == "sh" for line in block.body.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def files_of(page: Path) -> dict[str, dict]:
    """Settings that a page shows as a file: its first line is the name."""
    shown = [block.body for block in blocks(page) if block.kind == "yaml" and block.body.startswith("# ")]
    return {body.split()[1]: yaml.safe_load(body) for body in shown}


def check(words: list[str], files: dict[str, dict]) -> None:
    """Raise, or exit, where such a command could not be."""
    match words:
        case ["make", *rest]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert [word for word in rest if "=" not in word and word not in targets] == []
        case ["mixcl" | ".venv/bin/mixcl" | "mixcl/bin/mixcl", *rest]:
            check_verb(rest, files)
        case ["srun", "mixcl", *rest]:
            check_verb(rest, files)
        case ["torchrun", *rest]:
            check_verb(rest[rest.index("mixcl_dist") + 1 :], files)
        case ["python", "-c", program]:
            compile(program, "documentation", "exec")
        case ["python", file, *_]:
            assert (ROOT / file).is_file(), file
        case [program, *rest]:
            assert program in ELSEWHERE, program
            assert [word for word in rest if word.startswith("docs/") and not (ROOT / word).is_file()] == []


def check_verb(words: list[str], files: dict[str, dict]) -> None:
    options = parse(_parser(), words)
    if getattr(options, "launch", None):
        check_verb(options.command[1:], files)
    elif options.takes_settings:
        own = [files[str(file)] for file in options.config]
        for tree in own:
            from_dict(tree)
        load(recipe=options.recipe, overrides=options.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).with_suffix("").as_posix())
def test_every_command_is_one_that_there_is(page):
    files = files_of(page)
    for words in commands(page):
        try:
            check(words, files)
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(words)} is refused")


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "mixcl pretain --data shards --run runs/a",
        "mixcl pretrain --data shards --run runs/a --pretrain.step 3",
        "mixcl pretrain --data shards --run runs/a --pretrain.steps none",
        "mixcl launch local -- pretrain --data shards --run runs/a --recipe nobodys",
        "mixcl report",
        "python benchmarks/nobodys.py",
        "conda install mixcl",
    ],
)
def test_one_that_there_is_not_would_be_found(line):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(shlex.split(line), {})


def test_what_a_page_shows_of_a_file_is_included_from_one_that_is_there():
    lines = [line.strip() for page in PAGES for line in page.read_text().splitlines() if re.match(r"\s*--\s*8", line)]
    included = [re.fullmatch(r'--8<-- "(.+)"', line) for line in lines]
    assert len(included) > 3 and all(included), lines
    assert [found[1] for found in included if found and not (ROOT / found[1]).is_file()] == []


def test_the_guides_have_commands():
    guides = [page for page in PAGES if page.parent == ROOT / "docs" and page.stem not in ("wrong",)]
    assert len(guides) >= 8 and [page.name for page in guides if not commands(page)] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_chain_of_the_guides_runs(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    (phantom, *_) = commands(ROOT / "docs" / "index.md")
    assert run(phantom, tmp_path, environment).returncode == 0
    for page in (ROOT / "docs" / f"{stem}.md" for stem in RUN):
        write_files(page, tmp_path)
        for words in commands(page):
            if not NOT_RUN.search(line := shlex.join(words)):
                done = run(words, tmp_path, environment)
                assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout}{done.stderr}"
    for left in (
        "runs/few/dice.json",
        "runs/study/report/index.html",
        "runs/search/study.json",
        "exported/configs/metadata.json",
    ):
        assert (tmp_path / left).is_file(), left


def write_files(page: Path, folder: Path) -> None:
    """The settings and the list that a page shows, where its commands look for them."""
    for block in blocks(page):
        if block.kind == "yaml" and block.body.startswith("# "):
            (folder / block.body.split()[1]).write_text(block.body)
        if block.kind == "json":
            (folder / "ct" / "validation_cases.json").write_text(block.body)


def run(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    program = {"python": [sys.executable], "mixcl": [sys.executable, "-m", "mixcl_dist"]}[words[0]]
    command = [*program, *words[1:], *SIZES.get(words[1], [])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
