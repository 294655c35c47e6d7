"""What a run found, in words: a table for each stage, the few-label means, and what is missing."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

TRIAL = re.compile(r"table/(scratch|pretrained)-([\d.]+)-s(\d+)")


def write(machine: str, states: dict[str, str], records: dict[str, dict], wrong: list[str]) -> str:
    """Markdown; `states` has every planned item, `records` the newest record of each that has one."""
    lines = ["# Measured on one GPU", "", f"{machine}.", ""]
    lines.append(f"{sum(state == 'done' for state in states.values())} of {len(states)} items are current.")
    for stage in dict.fromkeys(item.partition("/")[0] for item in states):
        items = {item: state for item, state in states.items() if item.startswith(f"{stage}/")}
        lines += ["", f"## {stage}", "", "| item | state | measured | figures |", "| --- | --- | --- | --- |"]
        for item, state in items.items():
            record = records.get(item, {})
            lines.append(f"| {item} | {state} | {record.get('date', '–')} | {record.get('text', '–')} |")
        if stage == "table":
            lines += ["", *few_label_table(states, records)]
    left = [item for item, state in states.items() if state in ("missing", "stale")]
    lines += ["", f"Not measured in time: {', '.join(left)}." if left else "Nothing is missing."]
    lines += [f"WRONG: {', '.join(sorted(set(wrong)))}."] if wrong else []
    return "\n".join(lines) + "\n"


def few_label_table(states: dict[str, str], records: dict[str, dict]) -> Iterator[str]:
    """Mean Dice by fraction over the seeds, and the paired difference over those that have both arms."""
    planned = [match for match in map(TRIAL.fullmatch, states) if match]
    dice = {match.groups(): 100 * records[match[0]]["dice"] for match in planned if states[match[0]] == "done"}
    yield f"Mean Dice, {len(dice)} of {len(planned)} planned trials:"
    yield from ("", "| labels | scratch | pretrained | difference, seed by seed |", "| --- | --- | --- | --- |")
    for fraction in sorted({match[2] for match in planned}):
        scratch, pretrained = (
            {seed: value for (arm, f, seed), value in dice.items() if (arm, f) == (name, fraction)}
            for name in ("scratch", "pretrained")
        )
        means = [f"{statistics.mean(arm.values()):.1f} ({len(arm)})" if arm else "–" for arm in (scratch, pretrained)]
        pairs = [f"{pretrained[seed] - scratch[seed]:+.1f}" for seed in scratch if seed in pretrained]
        yield f"| {float(fraction):.0%} | {' | '.join(means)} | {', '.join(pairs) or '–'} |"
