"""The README.md of an export: what the network is, what it has seen, what it cannot do."""

from __future__ import annotations

import html
import re

from mixcl_dist.export.trained import Trained
from mixcl_dist.networks import dynunet


def card(trained: Trained, title: str, use: str, notes: str = "") -> str:
    """Markdown of a model card; `use` says how to load it, `notes` what is special about this form."""
    sections = [
        f"# {literal(title)}",
        _what(trained),
        f"## Use\n\n{use}",
        f"## Input and output\n\n{_interface(trained)}",
        f"## What it was trained on\n\n{_data(trained)}",
        f"## Results\n\n{_results(trained)}" if trained.is_segmentation else "",
        f"## Limits\n\n{_limits(trained)}",
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
    return f"{task}: MONAI DynUNet, channels {', '.join(map(str, trained.network.filters))}; made by mixcl-dist."


def _interface(trained: Trained) -> str:
    low, high = trained.network.window_hu
    divisor = dynunet.divisor(trained.network)
    grid = (
        "at the case's own spacing" if trained.spacing_mm is None
        else f"resampled to {' × '.join(f'{mm:g}' for mm in trained.spacing_mm)} mm"
    )  # fmt: skip
    lines = [
        f"- Input: one CT in Hounsfield units, axes (x, y, z) towards Right, Anterior, Superior (RAS), {grid}; "
        f"{low:g} to {high:g} HU mapped to -1 to 1 and clipped; shape (batch, 1, x, y, z).",
        f"- Every edge must be a multiple of {divisor} voxels, and at least {2 * divisor}; patches of "
        f"{' × '.join(map(str, trained.patch_size))} were used in fine-tuning.",
    ]
    if trained.is_segmentation:
        classes = ", ".join(f"{k} {literal(name)}" for k, name in enumerate(("background", *trained.classes)))
        lines.append(f"- Output: logits (batch, {len(trained.classes) + 1}, x, y, z): {classes}.")
    return "\n".join(lines)


def _data(trained: Trained) -> str:
    facts = trained.facts
    labels = len(facts.get("label_cases") or [])
    fraction, seed = literal(facts.get("fraction")), literal(facts.get("seed"))
    if trained.is_segmentation:
        start = f"the pre-training “{literal(facts.get('start_name'))}”" if facts.get("start") else "random weights"
        return (
            f"Fine-tuned from {start}. Labelled cases: {labels} (fraction {fraction} of the training cases, subset "
            f"seed {seed}). Validation cases: {len(facts.get('validation_cases') or [])}."
        )
    shards = facts.get("shards", {})
    return (
        f"Pre-trained on {len(facts.get('training_cases') or [])} CT volumes of shards with "
        f"{literal(shards.get('patches', '?'))} patches. Pixel labels were read of {labels} of them; labels of all "
        "other cases were withheld. Evaluate it only on cases that are not among these."
    )


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
    return f"{table}\n\nMeans over the {literal(scored)} cases in which the class was annotated; one run, no interval."


def _limits(trained: Trained) -> str:
    lines = [
        "- For research. Not a medical device, not for diagnosis or treatment.",
        "- Trained on the body regions, scanners and spacings of its data alone; other CT needs a check first.",
        "- Before you pass it on, check that the terms of the training data allow that.",
    ]
    if trained.is_segmentation and len(trained.facts.get("label_cases") or []) < 50:
        lines.append("- Few labelled cases: expect errors in uncommon anatomy.")
    return "\n".join(lines)
