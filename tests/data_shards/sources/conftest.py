"""What all tests of the sources have in common."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def pseudonym_key(monkeypatch):
    monkeypatch.setenv("MIXCL_PSEUDONYM_KEY", "key of the tests")
