"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# How long an example takes says more of the machine's other work than of the code.
settings.register_profile("mixcl", deadline=None)
settings.load_profile("mixcl")

# Without a GPU the Triton kernels are interpreted; Triton reads this when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Without it, reading DICOM would make a key in the home folder of whoever runs the tests.
os.environ.setdefault("MIXCL_PSEUDONYM_KEY", "tests")


@pytest.fixture(scope="session")
def ct() -> Path:
    """The folder of real CT (MIXCL_TEST_CT, or shared/ct beside the checkout); skips by name where it is missing."""
    folder = Path(os.environ.get("MIXCL_TEST_CT", ROOT.parent / "shared" / "ct"))
    if not (folder / "README.md").exists():
        pytest.skip(f"real CT is not at {folder}; set MIXCL_TEST_CT")
    return folder
