"""`mixcl predict`, `report`, `export` and `demo`, and the verbs that look at a machine and at settings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mixcl_dist.cli.verbs import add_verb, add_verbs, config_of, positive


def add_results(verbs: Any) -> None:
    summary = "segment new scans with a fine-tuned network"
    example = "mixcl predict runs/few --data new_scans/ --out predicted"
    add = add_verb(verbs, "predict", _predict, summary, example, takes_settings=False)
    add("model", type=Path, metavar="RUN|EXPORT", help="fine-tuning run, or its export to monai, hf or bundle")
    add("--data", type=Path, required=True, metavar="SOURCE", help="scans, as `mixcl shards build` reads them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; going on where it was interrupted")
    add("--probabilities", action="store_true", help="write those of each class, too")
    add("--mirror", action="store_true", help="average with left and right exchanged, where no class has a side")
    add("--workers", type=positive, metavar="N", help="processes (default: one for each GPU, or 1)")

    summary = "write one self-contained page about a run, a study, a table or a prediction"
    add = add_verb(verbs, "report", _report, summary, "mixcl report runs/study", takes_settings=False)
    add("path", type=Path, metavar="RUN|STUDY|TABLE|DIR", help="its folder; the page goes to report/index.html in it")

    example = "mixcl export runs/few --to monai --out exported"
    add = add_verb(verbs, "export", _export, "hand a network to other tools", example, takes_settings=False)
    add("run", type=Path, metavar="RUN", help="pre-training or fine-tuning run")
    add("--to", required=True, choices=["monai", "nnunet", "bundle", "hf", "onnx"], help="whose form")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")
    licence = "of the weights, as the terms of all training data allow, e.g. cc-by-4.0 (default: left open)"
    add("--licence", metavar="NAME", help=licence)
    table = "few-label table or study for the card (default: the one that RUN lies in)"
    add("--table", type=Path, metavar="TABLE|STUDY", help=table)

    add = add_verb(verbs, "demo", _demo, "the whole path on a phantom cohort", "mixcl demo --out runs/demo")
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write (default runs/demo)")

    example = "mixcl doctor --cluster --data shards"
    add = add_verb(verbs, "doctor", _doctor, "is this machine fit, or are those of a group", example)
    add("--cluster", action="store_true", help="look at all machines; behind srun, torchrun or mixcl launch … --")
    add("--data", metavar="SHARDS", help="with --cluster: read some of these shards on each machine")
    config = verbs.add_parser("config", allow_abbrev=False, help="look at settings")
    on_config = add_verbs(config)
    example = "mixcl config show finetune --recipe few_label --finetune.steps 500"
    add = add_verb(on_config, "show", _config_show, "print and explain the settings, and where each is from", example)
    add("section", nargs="?", metavar="SECTION", help="one section, in full (default: all, in brief)")


def _predict(options: argparse.Namespace) -> int:
    from mixcl_dist.finetuning.predict import predict
    from mixcl_dist.report import write_report

    switches = {key: getattr(options, key) for key in ("probabilities", "mirror", "workers")}
    found = predict(options.model, options.data, options.out, **switches)
    if found.dice and found.hd95_mm and found.surface_dice:
        print(f"{'':<24} Dice   surface Dice  HD95 (mm)")
        scores = [each.class_mean | {"mean": each.mean} for each in (found.dice, found.surface_dice, found.hd95_mm)]
        for name, *values in zip(scores[0], *(each.values() for each in scores), strict=True):
            dice, surface, hd95 = ("-" if value is None else f"{value:.3f}" for value in values)
            print(f"{name:<24} {dice:<6} {surface:<13} {hd95}")
    done = len(list((options.out / "cases").glob("*.json")))
    print(f"{options.out / 'labels'}: {done} of {len(found.cases)} scans; page: {write_report(options.out)}")
    if found.refused:
        print(f"mixcl: {len(found.refused)} could not be used or scored; see the page", file=sys.stderr)
    return 1 if found.refused else 0


def _report(options: argparse.Namespace) -> None:
    from mixcl_dist.report import write_report

    print(write_report(options.path))


def _export(options: argparse.Namespace) -> None:
    from mixcl_dist.export import export

    folder = export(options.run, options.to, options.out, licence=options.licence, table=options.table)
    card = next(folder.rglob("README.md"))  # a bundle's lies in docs/
    print(f"{folder}; how to use it stands in {card}")


def _demo(options: argparse.Namespace) -> None:
    from mixcl_dist.demo import demo

    demo(config_of(options, recipe="demo"), options.out)


def _doctor(options: argparse.Namespace) -> int:
    from mixcl_dist.cluster.doctor import examine
    from mixcl_dist.cluster.group import described

    findings = _of_machines(options) if options.cluster else examine()
    if described().rank == 0:
        for finding in findings:
            print(f"{'ok  ' if finding.fit else 'FAIL'}  {finding.name:<18} {finding.detail}")
    return 0 if all(finding.fit for finding in findings) else 1


def _of_machines(options: argparse.Namespace) -> Any:
    from mixcl_dist.cluster.machines import examine_machines
    from mixcl_dist.data_shards.inspection.rate import read_rate

    read = options.data and (lambda part, parts: read_rate(options.data, part=part, parts=parts))
    return examine_machines(read, timeout_s=config_of(options).engine.timeout_s)


def _config_show(options: argparse.Namespace) -> None:
    from mixcl_dist.config import layers
    from mixcl_dist.manual import manual

    given = layers(*options.config, recipe=options.recipe, overrides=options.overrides)
    print(manual(config_of(options), given, options.section), end="")
