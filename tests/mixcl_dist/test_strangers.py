"""Run folders are exchanged: nothing in one that comes from a stranger is ever run, and damage ends in one line."""

from __future__ import annotations

import hashlib
import json
import pathlib
import pickle
import random
import shutil
import sys

import pytest

from mixcl_dist import cli
from mixcl_dist.config import replace
from mixcl_dist.pretraining.pretrain import pretrain


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.fixture(scope="module")
def finished(shards, small_config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    pretrain(replace(small_config, {"pretrain.steps": 2, "checkpoint.every": 1}), shards=shards, run=run)
    return run


def forge(checkpoint, name, content):
    """Put `content` into a checkpoint under a seal that says so."""
    (checkpoint / name).write_bytes(content)
    seal = json.loads((checkpoint / "checkpoint.json").read_text())
    seal["files"][name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(seal))


def resume(shards, run):
    return cli.main(["pretrain", "--data", str(shards), "--run", str(run), "--resume", "latest"])


@pytest.mark.parametrize("name", ["engine.safetensors", "engine/mp_rank_00_model_states.pt"])
def test_a_checkpoint_under_a_forged_seal_runs_nothing(finished, shards, tmp_path, capsys, name):
    run = shutil.copytree(finished, tmp_path / "run")
    newest = run / "checkpoints" / "step_00000002"
    (newest / "engine").mkdir()
    forge(newest, name, pickle.dumps(Trap(tmp_path / "ran")))
    code = resume(shards, run)
    assert not (tmp_path / "ran").exists()
    if name == "engine.safetensors":
        assert code == 2 and "cannot be taken up" in capsys.readouterr().err.splitlines()[-1]


def test_damaged_checkpoints_are_passed_over_or_refused_in_one_line(finished, shards, tmp_path, capsys):
    """Bytes flipped, files cut or emptied, at random places: it goes on from the older one, or stops, and says so."""
    choice = random.Random(0)
    run = shutil.copytree(finished, tmp_path / "run")
    for both in (False, True):
        for checkpoint in sorted((run / "checkpoints").iterdir())[0 if both else 1 :]:
            victim = choice.choice([path for path in sorted(checkpoint.rglob("*")) if path.is_file()])
            content = bytearray(victim.read_bytes())
            content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
            victim.write_bytes(content if both else content[: choice.randrange(len(content))])
        code, said = resume(shards, run), capsys.readouterr().err
        assert "Traceback" not in said and "is passed over" in said
        assert code == (2 if both else 0)


BRIEF = ["--finetune.steps", "2", "--finetune.patch_size", "24,24,24"]
VERBS = {
    "pretrain": ["pretrain", "--data", "SHARDS", "--run", "RUN", "--resume", "latest"],
    "probe": ["probe", "RUN", "--data", "SHARDS"],
    "finetune": ["finetune", "--data", "DATA", "--from", "RUN", "--scans", "1", "--run", "OUT", *BRIEF],
    "report": ["report", "RUN"],
    "export": ["export", "RUN", "--to", "monai", "--out", "OUT"],
    "start": ["pretrain", "--data", "SHARDS", "--run", "OUT", "--start", "RUN"],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_what_stands_in_any_file_that_it_reads(finished, shards, data, tmp_path, verb):
    """Which these are is seen by opening them: each is a pickle in turn, whatever becomes of the verb."""

    def go(number):
        run = shutil.copytree(finished, tmp_path / str(number) / "run", dirs_exist_ok=True)
        places = {"SHARDS": shards, "DATA": data, "RUN": run, "OUT": run.parent / "out"}
        return run, [str(places.get(word, word)) for word in VERBS[verb]]

    opened = set()
    watching = [True]

    def hook(event, arguments):
        if watching[0] and event == "open" and isinstance(arguments[0], (str, pathlib.Path)):
            opened.add(str(arguments[0]))

    sys.addaudithook(hook)
    run, words = go("whole")
    cli.main(words)
    watching[0] = False
    read = sorted(path for path in finished.rglob("*") if str(run / path.relative_to(finished)) in opened)
    assert read
    for number, path in enumerate(read):
        run, words = go(number)
        (run / path.relative_to(finished)).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
        try:
            cli.main(words)
        except (Exception, SystemExit) as error:  # one line or not is another test's question
            assert not isinstance(error, MemoryError)
        assert not (tmp_path / "ran").exists(), path
