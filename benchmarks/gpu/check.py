"""Is a tuning table's entry right on this card? The kernel benchmark's gate, at the width and dtype of an entry."""

from __future__ import annotations

import argparse

from worker import work  # first, as it makes what follows importable

# isort: split
import gate
import torch

ROWS, TINY_ROWS = (513, 4097), (65,)
SANITIZED = "bf16-128", (129,)


def measure(item: str, options: argparse.Namespace) -> dict:
    """Of `check/DTYPE-WIDTH` the worst errors of all cases; `check/sanitizer` is one small case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = item.partition("/")[2]
    if name == "sanitizer":
        cases = gate.entry_cases(*SANITIZED, device)[:1]
    else:
        cases = gate.entry_cases(name, TINY_ROWS if options.tiny else ROWS, device)
    results = [gate.check(case, "triton") | {"case": f"{case.name}, N {len(case.rows):,}"} for case in cases]
    wrong = [result["case"] for result in results if not result["passed"]]
    worst = {name: max(result[f"{name}_error"] for result in results) for name in ("loss", "gradient", "temperature")}
    text = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    text = f"{len(results)} cases, worst errors: {text}" + (f"; wrong: {', '.join(wrong)}" if wrong else "")
    return {"passed": not wrong, "errors": worst, "cases": len(results), "text": text}


if __name__ == "__main__":
    work(__doc__, measure)
