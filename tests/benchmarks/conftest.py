"""What tests of several benchmarks need."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDERS = [Path(__file__).resolve().parents[2] / "benchmarks" / name for name in ("gpu", "kernel")]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the GPU queue as its programs would; they are siblings, not a package."""
    for folder in reversed(FOLDERS):
        monkeypatch.syspath_prepend(folder)
    before, path = set(sys.modules), list(sys.path)
    yield import_module
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent in FOLDERS:
            del sys.modules[name]
