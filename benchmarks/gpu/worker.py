"""What the programs of all stages share: they measure the items named on their command line and report each at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "kernel")]


def work(description: str | None, measure: Callable[[str, argparse.Namespace], dict]) -> None:
    """Measure item by item. `measure` returns figures, among them "text" for people; `passed: False` says it is wrong,
    `partial: True` that the next run has to go on with it.

    An item that raises ends the program, as the GPU may have faulted: the driver starts it again for those that remain.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("items", nargs="+", metavar="ITEM")
    parser.add_argument("--work", type=Path, required=True, help="folder with the pack's content and all runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--seconds", type=float, default=60, help="about so long in all (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, also without a GPU")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend_interpreter()
    for item in options.items:
        print(json.dumps({"item": item, **measure(item, options)}), flush=True)


def mend_interpreter() -> None:
    """Triton 3.6 reads a tensor of one number by `int(array)`, which NumPy refuses from 2.4 on; Triton 3.7 does not."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
