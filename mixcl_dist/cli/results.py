"""`mixcl report`, `export` and `demo`, and the verbs that look at a machine and at settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mixcl_dist.cli.verbs import add_verb, add_verbs, config_of


def add_results(verbs: Any) -> None:
    summary = "write one self-contained page about a run, a study or a table"
    add = add_verb(verbs, "report", _report, summary, "mixcl report runs/study", takes_settings=False)
    add("path", type=Path, metavar="RUN|STUDY|TABLE", help="its folder; the page goes to report/index.html in it")

    example = "mixcl export runs/few --to monai --out exported"
    add = add_verb(verbs, "export", _export, "hand a network to other tools", example, takes_settings=False)
    add("run", type=Path, metavar="RUN", help="pre-training or fine-tuning run")
    add("--to", required=True, choices=["monai", "nnunet", "bundle", "hf"], help="whose form")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")
    licence = "of the weights, as the terms of all training data allow, e.g. cc-by-4.0 (default: left open)"
    add("--licence", metavar="NAME", help=licence)

    add = add_verb(verbs, "demo", _demo, "the whole path on a phantom cohort", "mixcl demo --out runs/demo")
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write (default runs/demo)")

    add_verb(verbs, "doctor", _doctor, "is this machine fit", "mixcl doctor", takes_settings=False)
    config = verbs.add_parser("config", allow_abbrev=False, help="look at settings")
    on_config = add_verbs(config)
    example = "mixcl config show finetune --recipe few_label --finetune.steps 500"
    add = add_verb(on_config, "show", _config_show, "print and explain the settings, and where each is from", example)
    add("section", nargs="?", metavar="SECTION", help="one section, in full (default: all, in brief)")


def _report(options: argparse.Namespace) -> None:
    from mixcl_dist.report import write_report

    print(write_report(options.path))


def _export(options: argparse.Namespace) -> None:
    from mixcl_dist.export import export

    print(export(options.run, options.to, options.out, licence=options.licence))


def _demo(options: argparse.Namespace) -> None:
    from mixcl_dist.demo import demo

    demo(config_of(options, recipe="demo"), options.out)


def _doctor(options: argparse.Namespace) -> int:
    from mixcl_dist.cluster.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{'ok  ' if finding.fit else 'FAIL'}  {finding.name:<18} {finding.detail}")
    return 0 if all(finding.fit for finding in findings) else 1


def _config_show(options: argparse.Namespace) -> None:
    from mixcl_dist.config import layers
    from mixcl_dist.manual import manual

    given = layers(*options.config, recipe=options.recipe, overrides=options.overrides)
    print(manual(config_of(options), given, options.section), end="")
