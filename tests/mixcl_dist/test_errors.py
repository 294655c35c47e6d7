"""Whatever the project refuses is caught by `REFUSALS`, so that the command line shows one line and no traceback."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest

from mixcl_dist.errors import REFUSALS

from ..conftest import ROOT

ROOMS = ("mixcl_dist", "data_shards", "cluster", "kernels")
BASES = {base.__name__ for base in REFUSALS}
NO_REFUSAL = {"Stopped": "the end of a run that was asked to end, which `mixcl pretrain` shows"}


def exceptions(*rooms: Path) -> dict[str, set[str]]:
    """Every public class of an exception in these folders, and all that it derives from, read without running them."""
    bases: dict[str, set[str]] = {}
    for file in (file for room in rooms for file in sorted(room.rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}

    def above(name: str) -> set[str]:
        return {name}.union(*(above(base) for base in bases.get(name, set()) - {name}))

    names = {name: above(name) for name in bases if not name.startswith("_")}
    return {name: of for name, of in names.items() if any(is_exception(each) for each in of)}


def is_exception(name: str) -> bool:
    known = getattr(builtins, name, None)
    return isinstance(known, type) and issubclass(known, BaseException)


def strays(found: dict[str, set[str]]) -> list[str]:
    return [name for name, of in found.items() if not of & BASES and name not in NO_REFUSAL]


def test_every_exception_of_the_project_is_a_refusal():
    found = exceptions(*(ROOT / room for room in ROOMS))
    assert len(found) > 15 and strays(found) == []
    assert NO_REFUSAL.keys() <= found.keys()


@pytest.mark.parametrize("base", ["ValueError", "Exception", "errors.LostError", "OSError"])
def test_one_that_would_show_a_traceback_is_found(tmp_path, base):
    (tmp_path / "one.py").write_text("class LostError(RuntimeError): ...\nclass KeptError(DataError): ...\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "two.py").write_text(f"class PlantedError({base}):\n    '''Nobody catches it.'''\n")
    assert strays(exceptions(tmp_path)) == ["PlantedError", "LostError"]
