"""Messages, provoked: what the tests of cures share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mixcl_dist.errors import REFUSALS


def refused(said: str, check: Callable[..., object], *given: object, **options: object) -> str:
    """What the group of `said`, a pattern, finds in the one line with which `check` refuses what is given."""
    with pytest.raises(REFUSALS) as error:
        check(*given, **options)
    found = re.search(said, str(error.value))
    assert found and "\n" not in str(error.value), str(error.value)
    return found[1] if found.groups() else ""


def interrupt(run: Path) -> None:
    """Let a finished run look as if its process had been ended."""
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"finished": None}))
