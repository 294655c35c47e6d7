"""The README.md of an export: what the network is, what it has seen, what it cannot do."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mixcl_dist.export.comparison import Comparison
from mixcl_dist.export.trained import Trained
from mixcl_dist.networks import architectures
from mixcl_dist.pretraining import summary
from mixcl_dist.records import read_metrics

ADDED = "What mixcl-dist itself adds to this folder is under Apache-2.0."
UNKNOWN_LICENCE = (
    "The weights inherit the terms of the data that they were trained on, which this run does not record: find them "
    f"out before you pass the weights on. {ADDED}"
)


def card(trained: Trained, title: str, use: str, notes: str = "") -> str:
    """Markdown of a model card; `use` says how to load it, `notes` what is special about this form."""
    sections = [
        f"# {literal(title)}",
        _what(trained),
        f"## Use\n\n{use}",
        f"## Input and output\n\n{_interface(trained)}",
        f"## What it was trained on\n\n{_data(trained)}",
        f"## Results\n\n{_results(trained)}" if trained.is_segmentation else "",
        f"## Few labels\n\n{_few_labels(trained.comparison)}" if trained.comparison else "",
        f"## Compute\n\n{_compute(trained)}",
        f"## Limits\n\n{_limits(trained)}",
        f"## Licence\n\n{_licence(trained)}",
        notes,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def literal(text: object) -> str:
    """A name from the run's folder as one line of Markdown that shows it as it is, not as markup or HTML."""
    marks = r"([\\`*\[\]|#$~!]|(?<![^\W_])_|_(?![^\W_]))"
    return re.sub(marks, r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _named(class_name: str) -> str:
    return literal(class_name.replace("_", " "))


def _what(trained: Trained) -> str:
    task = (
        f"A network that segments {', '.join(map(_named, trained.classes))} in CT"
        if trained.is_segmentation
        else "An encoder-decoder for CT, pre-trained with mixed contrastive learning (MixCL), to be fine-tuned"
    )
    public = trained.architecture.CLASS
    name = f"{'MONAI ' if public.startswith('monai.') else ''}{public.rpartition('.')[2]}"
    return f"{task}: {name}, channels {', '.join(map(str, trained.network.filters))}; made by mixcl-dist."


def _interface(trained: Trained) -> str:
    low, high = trained.network.window_hu
    views = trained.config.views.size
    grid = (
        "at the case's own spacing" if trained.spacing_mm is None
        else f"resampled to {' × '.join(f'{mm:g}' for mm in trained.spacing_mm)} mm (an axis "
        "that becomes coarser is blurred first, by a Gaussian of full width at half maximum √(new² − old²) mm)"
    )  # fmt: skip
    lines = [
        f"- Input: one CT in Hounsfield units, axes (x, y, z) towards Right, Anterior, Superior (RAS), {grid}; "
        f"{low:g} to {high:g} HU mapped to -1 to 1 and clipped; shape (batch, 1, x, y, z).",
        f"- {_edges(architectures.divisor(trained.network))}; it was trained on "
        + (f"patches of {times(trained.patch_size)}." if trained.is_segmentation else f"views of {times(views)}."),
    ]
    if trained.is_segmentation:
        classes = ", ".join(f"{k} {literal(name)}" for k, name in enumerate(("background", *trained.classes)))
        lines.append(f"- Output: logits (batch, {len(trained.classes) + 1}, x, y, z): {classes}.")
    return "\n".join(lines)


def _licence(trained: Trained) -> str:
    if not trained.licence:
        return UNKNOWN_LICENCE
    given = "the terms that whoever made this folder states for the data that they were trained on"
    return f"The weights are under {literal(trained.licence)}: {given}. {ADDED}"


def _edges(divisor: Sequence[int]) -> str:
    if len(set(divisor)) == 1:
        return f"Every edge must be a multiple of {divisor[0]} voxels, and at least {2 * divisor[0]}"
    return f"Edges must be multiples of {times(divisor)} voxels, and at least {times(2 * step for step in divisor)}"


def times(size: Any) -> str:
    return " × ".join(map(str, size))


def _data(trained: Trained) -> str:
    lines = _finetuned(trained) if trained.is_segmentation else _pretrained(trained)
    return "\n".join(f"- {line}" for line in lines)


def _finetuned(trained: Trained) -> list[str]:
    facts, labels = trained.facts, len(trained.facts.get("label_cases") or [])
    start = f"the run “{literal(facts.get('start_name'))}”" if facts.get("start") else "random weights"
    share = f"fraction {literal(facts['fraction'])} of the training scans, " if facts.get("fraction") else ""
    draw = f"{share}subset seed {literal(facts.get('seed'))}"
    return [
        f"Fine-tuned from {start} with the labels of {_scans(labels)} ({draw}).",
        f"It and its start have seen {_scans(len(facts.get('training_cases') or []))} in all.",
        "Leak audit: no start is taken that has seen a validation or development scan, or a label outside the budget, "
        "under whatever name or resampled; scans are compared by their voxels." + _told_apart(facts)
        if facts.get("start")
        else "Leak audit: it began with random weights and has seen its labelled scans alone.",
    ]


def _told_apart(facts: Mapping[str, Any]) -> str:
    pairs = [
        f"{literal(case)} and {literal(other)} ({by:.4f})" for case, other, by in facts.get("distinct_patients") or ()
    ]
    said = "A person said of these, which look like one scan at that distance, that they are of two patients"
    return f" {said}: {', '.join(pairs)}." if pairs else ""


def _pretrained(trained: Trained) -> list[str]:
    facts, labels = trained.facts, len(trained.facts.get("label_cases") or [])
    file = trained.run / "metrics.jsonl"
    datasets = [f"{literal(name)} ({literal(n)})" for name, n in (facts.get("datasets") or {}).items()]
    return [
        literal(summary.told(facts, read_metrics(file) if file.is_file() else [])),
        f"Scans by data set: {', '.join(datasets)}."
        if datasets
        else "The run does not record the names of its data sets.",
        f"Pixel labels were read of {_scans(labels)}; those of all others were withheld.",
        f"Leak audit: {_scans(len(facts.get('withheld_cases') or []))} of the shards were withheld for validation and "
        "development. Evaluate it only on scans that it has not seen: `mixcl finetune` compares them by their voxels.",
    ]


def _scans(number: int) -> str:
    return f"{number} scan{'' if number == 1 else 's'}"


def _compute(trained: Trained) -> str:
    facts, machine = trained.facts, trained.facts.get("machine") or {}
    steps = trained.config.finetune.steps if trained.is_segmentation else trained.config.pretrain.steps
    seconds, device = facts.get("seconds"), machine.get("gpu") or machine.get("cpu")
    time = f" in {seconds:,.0f} s" if isinstance(seconds, int | float) else ""
    where = (
        f" on {literal(device)}, {literal(machine.get('cores', '?'))} cores" if device else " on a machine not recorded"
    )
    earlier = ", without what its start had cost" if facts.get("start") else ""
    return f"{steps:,} steps{time}{where}{earlier}."


def _results(trained: Trained) -> str:
    dice = trained.dice
    if not dice or dice["mean"] is None:
        return "Not scored."
    rows = [
        f"| {_named(name)} | {'–' if value is None else f'{100 * value:.1f}'} |"
        for name, value in dice["class_mean"].items()
    ]
    table = "\n".join(["| class | Dice (%) |", "|---|---|", *rows, f"| **mean** | **{100 * dice['mean']:.1f}** |"])
    scored = trained.facts.get("scored", "validation")
    labels = _scans(len(trained.facts.get("label_cases") or []))
    scored = f"{len(dice['cases'])} {literal(scored)} cases"
    means = f"Means over those of the {scored} in which the class was annotated; one run, no interval."
    return f"Learnt from the labels of {labels}:\n\n{table}\n\n{means}"


def _few_labels(comparison: Comparison) -> str:
    labels = "labelled scans" if comparison.kind == "few-label table" else "share of labels"
    head = f"| {labels} | start | trials | mean Dice (%) | gain over scratch, points (95 % interval) |"
    rows = [f"| {' | '.join(literal(text) or '–' for text in line)} |" for line in comparison.lines]
    table = "\n".join([head, "|---|---|---|---|---|", *rows])
    best = f"; of up to {comparison.draws} draws of searched values the best one" if comparison.draws > 1 else ""
    means = (
        f"From the {comparison.kind} “{literal(comparison.name)}”. {literal(comparison.role)} Means over classes, "
        f"{literal(comparison.scored)} cases and subset seeds ± standard deviation over seeds{best}."
    )
    return f"{literal(comparison.found)}\n\n{table}\n\n{means}"


def _limits(trained: Trained) -> str:
    lines = [
        "- For research. Not a medical device, not for diagnosis or treatment.",
        "- Trained on the body regions, scanners and spacings of its data alone; other CT needs a check first.",
    ]
    if trained.is_segmentation and len(trained.facts.get("label_cases") or []) < 50:
        lines.append("- Few labelled cases: expect errors in uncommon anatomy.")
    return "\n".join(lines)
