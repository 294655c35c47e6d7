"""What a run found, in words: a table for each stage, the few-label table's rows, and what is missing."""

from __future__ import annotations


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
        for table in (records[item]["table"] for item in items if "table" in records.get(item, {})):
            lines += ["", "```", table, "```"]
    left = [item for item, state in states.items() if state in ("missing", "stale", "partial")]
    lines += ["", f"Not measured in time: {', '.join(left)}." if left else "Nothing is missing."]
    lines += [f"WRONG: {', '.join(sorted(set(wrong)))}."] if wrong else []
    return "\n".join(lines) + "\n"
