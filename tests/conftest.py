"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# How long an example takes says more of the machine's other work than of the code. The examples are the same in every
# run; `pytest --hypothesis-profile default` looks at others.
settings.register_profile("mixcl", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mixcl")

# Without a GPU the Triton kernels are interpreted; Triton reads this when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

    # The interpreter patches triton.language anew at every call of a device function, which takes a third of its time;
    # within a launch it is patched already.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang

    def _patch_once(function: Callable) -> object:
        language = interpreter.tl
        seen = [value for value in function.__globals__.values() if value is language or value is language.core]
        if seen and not any(language.core.is_builtin(each.load) for each in seen):
            return interpreter._LangPatchScope()
        return _patch(function)

    interpreter._patch_lang = _patch_once

# Without it, reading DICOM would make a key in the home folder of whoever runs the tests.
os.environ.setdefault("MIXCL_PSEUDONYM_KEY", "tests")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers of no generator of their own are those of the test, whichever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ct() -> Path:
    """The folder of real CT (MIXCL_TEST_CT, or shared/ct beside the checkout); skips by name where it is missing."""
    folder = Path(os.environ.get("MIXCL_TEST_CT", ROOT.parent / "shared" / "ct"))
    if not (folder / "README.md").exists():
        pytest.skip(f"real CT is not at {folder}; make test MIXCL_TEST_CT=FOLDER")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was left out, and the command that brings it, in the last lines."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section(f"{len(skipped)} tests were skipped: why, and what brings them")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5}  {reason}")
