"""The command line as a user meets it: help at once, one clear line for what is refused."""

import re
import subprocess
import sys
import time

import pytest

from mixcl_dist.cli import main

VERBS = ["shards build", "shards inspect", "shards verify", "pretrain", "finetune", "tune", "report", "export", "demo",
         "doctor", "config show"]  # fmt: skip


def mixcl(*arguments):
    command = [sys.executable, "-m", "mixcl_dist", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_help_comes_in_half_a_second():
    mixcl("--help")
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        assert mixcl("--help").returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb):
    shown = mixcl(*verb.split(), "--help")
    assert shown.returncode == 0
    assert f"example:\n  mixcl {verb}" in shown.stdout


def test_the_examples_in_help_are_accepted_by_the_parser():
    for verb in VERBS:
        example = re.search(r"example:\n  mixcl (.*)", mixcl(*verb.split(), "--help").stdout).group(1)
        if verb not in ("doctor", "demo"):
            said = mixcl(*example.split()).stderr
            assert "unrecognized" not in said and "usage:" not in said, f"{example}: {said}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "--data", "absent", "--run", "r"], "absent"),
        (["pretrain", "--data", "absent", "--run", "r", "--pretrain.step", "3"], "did you mean pretrain.steps?"),
        (["config", "show", "--recipee", "demo"], "did you mean --recipe?"),
        (["config", "show", "--views.size"], "needs a value"),
        (["config", "show", "stray"], "unexpected argument 'stray'"),
        (["report", "absent"], "absent"),
        (["export", "absent", "--to", "monai", "--out", "o"], "absent"),
        (["shards", "build", "absent", "--out", "s"], "absent"),
        (["shards", "verify", "absent"], "absent"),
        (["shards", "inspect", "absent"], "absent"),
        (["finetune", "--data", "absent", "--from", "none", "--labels", "0.1", "--run", "r"], "absent"),
        (["finetune", "--data", "absent", "--from", "none", "--labels", "5", "--run", "r"], "budget.fraction = 5"),
        (["finetune", "--data", "absent", "--from", "none", "--scans", "0", "--run", "r"], "budget.scans = 0"),
        (
            ["finetune", "--data", "absent", "--from", "none", "--labels", ".5", "--scans", "4", "--run", "r"],
            "fraction 0.5 and scans 4 are both given; set one of them",
        ),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = mixcl(*arguments)
    assert refused.returncode == 2
    last = refused.stderr.strip().splitlines()[-1]
    assert said in last
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []


LAUNCHED = ["--", "pretrain", "--data", "shards", "--run", "runs/a", "--pretrain.steps", "5"]


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (["local", "--processes", "2"], "--nproc-per-node=2 --standalone"),
        (["hosts", "--hosts", "a,b"], "ssh -tt -o BatchMode=yes b"),
        (["slurm", "--nodes", "2", "--gpus-per-node", "8"], "#SBATCH --ntasks-per-node=8"),
        (["kubernetes", "--image", "mixcl", "--claim", "archive"], "kind: Job"),
        (["kubernetes", "--image", "mixcl", "--claim", "archive", "--ray-job"], "kind: RayJob"),
        (["ray", "--nodes", "3"], "3 x 1 processes on auto"),
    ],
)
def test_launch_shows_what_it_would_start(way, said, capsys):
    assert main(["launch", *way, "--dry-run", *LAUNCHED]) == 0
    shown = capsys.readouterr().out
    assert said in shown and "--pretrain.steps 5" in shown
