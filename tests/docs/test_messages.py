"""The page of messages has what the command line really says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from mixcl_dist.cli import main
from mixcl_dist.cluster.launch.job import REQUEUE

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("documented_messages", ROOT / "docs" / "hooks" / "messages.py")
pages = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = pages  # where dataclasses look
SPEC.loader.exec_module(pages)


@pytest.fixture(scope="module")
def patterns():
    """Every message of the page, as what its texts with anything filled in look like."""
    return [re.compile(pattern(message.text)) for message in pages.messages(ROOT / "mixcl_dist")]


def pattern(text: str) -> str:
    """Of alternatives the parts may stand in any form, so each piece between two bars is looked for by itself."""
    pieces = [re.sub("‹[^›]*›", ".*", re.escape(piece)) for piece in text.split(pages.ALTERNATIVE)]
    return ".*".join(pieces) if len(pieces) == 1 else "(?:" + "|".join(pieces) + ")"


@pytest.mark.parametrize(
    "words",
    [
        ["config", "show", "--recipe", "nobodys"],
        ["config", "show", "--config", "nobodys.yaml"],
        ["config", "show", "--budget.fraction", "0.5", "--budget.scans", "2"],
        ["config", "show", "nobodys"],
        ["shards", "inspect", "nobodys"],
        ["launch", "slurm", "--dry-run", "--"],
        ["launch", "hosts", "--hosts", "a,a", "--", "doctor"],
    ],
    ids=" ".join,
)
def test_what_is_said_is_on_the_page(words, patterns, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1].removeprefix("mixcl: ")
    assert any(one.search(said) for one in patterns), said


def test_every_class_that_refuses_says_in_a_sentence_what():
    classes = pages.error_classes(ROOT / "mixcl_dist")
    assert len(classes) > 12 and [name for name, says in classes.items() if not says] == []


def test_a_message_is_read_through_names_forms_and_cures(tmp_path):
    package = tmp_path / "one"
    package.mkdir()
    (package / "a.py").write_text(
        '''AGAIN = "copy it again"
class OneError(ValueError):
    """What one cannot take."""
def open_it(path, cure):
    what = f"is {path.stem} bytes" if path else "is empty"
    raise OneError(f"{path}: {what}; {AGAIN}")
def read_it(path):
    raise OneError("is no number", where=path, cure="give " + "one")
def again(error):
    raise OneError(f"{error}")
'''
    )
    assert [message.text for message in pages.messages(package)] == [
        "‹path›: is no number; give one",
        "‹path›: is ‹stem› bytes | is empty; copy it again",
    ]


def test_the_exit_codes_are_those_of_the_command_line():
    told = [int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "wrong.md").read_text(), re.MULTILINE)]
    assert told == sorted({0, 1, 2, REQUEUE, 130})
    assert all(str(code) in main.__doc__ for code in told)
