"""`mixcl`: verbs → functions. Everything heavy is imported inside the verb that needs it."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SETTINGS = """settings:
  --recipe NAME            start from a named recipe
  --config FILE            read settings from a YAML file (may be given again; the later wins)
  --section.key VALUE      set one value, e.g. --pretrain.steps 2000 --views.size 32,32,32
  `mixcl config show` prints every section, key and value.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the process's exit code: 0 done, 1 done with problems, 2 refused, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        options.overrides = _overrides(rest, options.parser)
        return options.verb(options) or 0
    except KeyboardInterrupt:
        print("mixcl: interrupted; run the same command again (pretrain: with --resume latest)", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"mixcl: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except ValueError as error:
        # What this project refuses is one line; any other ValueError is a defect and keeps its traceback.
        if not type(error).__module__.startswith("mixcl_dist."):
            raise
        print(f"mixcl: {error}", file=sys.stderr)
        return 2


def _shards_build(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.build import build
    from mixcl_dist.progress import ProgressReport

    config = _config(options)
    result = build(options.source, options.out, config.build, ProgressReport("build"))
    manifest = result.manifest
    print(f"{options.out}: {len(manifest.cases)} cases, {manifest.patches} patches, {len(manifest.shards)} shards")
    for problem in result.quarantined:
        print(f"quarantined: {problem}", file=sys.stderr)
    if result.quarantined:
        listing = options.out / ".build" / "quarantine.jsonl"
        print(f"mixcl: {len(result.quarantined)} quarantined, listed in {listing}", file=sys.stderr)
    return 1 if result.quarantined else 0


def _shards_inspect(options: argparse.Namespace) -> None:
    from mixcl_dist.data_shards.manifest import inspect

    held = inspect(options.shards)
    print(f"{held['cases']} cases, {held['patches']} patches in {held['shards']} shards, digest {held['digest']}")
    mebibytes, codecs = held["bytes"] / 2**20, ", ".join(held["codec"].values())
    print(f"{mebibytes:.1f} MiB, {held['bytes_per_voxel']:.3f} bytes/voxel; {codecs}")
    axes = [f"{low:.3g}" if high - low < 1e-6 else f"{low:.3g}–{high:.3g}" for low, high in held["spacing_range_mm"]]
    print(f"patches of {'×'.join(map(str, held['patch_size']))} voxels, spacing {', '.join(axes)} mm")
    for part in held["datasets"]:
        print(f"\n{part['dataset']} ({part['split']}): {part['cases']} cases, {part['patches']} patches, ", end="")
        print(f"{part['labelled']} with labels")
        for name, cases in part["annotated"].items():
            print(f"  {name:<28} {cases:>6} cases")


def _shards_verify(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.manifest import verify

    problems = verify(options.shards)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{options.shards}: {'whole' if not problems else f'{len(problems)} problems'}")
    return 1 if problems else 0


def _pretrain(options: argparse.Namespace) -> None:
    from mixcl_dist.pretrain import pretrain

    if options.resume and (options.run / "config.yaml").exists():
        options.config.insert(0, options.run / "config.yaml")
    pretrain(_config(options), shards=options.data, run=options.run, resume=options.resume is not None)
    print(f"pre-trained network in {options.run}; next: mixcl report {options.run}")


def _finetune(options: argparse.Namespace) -> None:
    from mixcl_dist.config import replace
    from mixcl_dist.finetune import finetune

    config = replace(_config(options), {"budget.fraction": options.labels, "budget.seed": options.seed})
    dice = finetune(config, data=options.data, start=options.start, run=options.run)
    for name, value in dice["class_mean"].items():
        print(f"{name:<24} {'-' if value is None else f'{value:.3f}'}")
    print(f"{'mean Dice':<24} {dice['mean']:.3f}    ({options.run}; next: mixcl report {options.run})")


def _tune(options: argparse.Namespace) -> int:
    from mixcl_dist.report import study_table
    from mixcl_dist.study import run_study

    study = run_study(_config(options), data=options.data, starts=options.start, study=options.study)
    failed = [trial["id"] for trial in study["trials"] if trial["status"] != "done"]
    if failed:
        print(f"mixcl: trials not done: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    print(study_table(options.study))
    print(f"study in {options.study}; next: mixcl report {options.study}")
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> None:
    from mixcl_dist.report import write_report

    print(write_report(options.path))


def _export(options: argparse.Namespace) -> None:
    from mixcl_dist.export import export

    print(export(options.run, options.to, options.out))


def _demo(options: argparse.Namespace) -> None:
    from mixcl_dist.demo import demo

    demo(_config(options, recipe="demo"), options.out)


def _doctor(options: argparse.Namespace) -> int:
    from mixcl_dist.cluster.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{'ok  ' if finding.fit else 'FAIL'}  {finding.name:<18} {finding.detail}")
    return 0 if all(finding.fit for finding in findings) else 1


def _config_show(options: argparse.Namespace) -> None:
    from mixcl_dist.config import to_yaml

    print(to_yaml(_config(options)), end="")


def _config(options: argparse.Namespace, recipe: str | None = None) -> Any:
    from mixcl_dist.config import load

    return load(*options.config, recipe=options.recipe or recipe, overrides=options.overrides)


def _overrides(rest: Sequence[str], parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """`--section.key value` and `--section.key=value` pairs of what the verb's own options left over."""
    pairs = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            parser.error(f"unexpected argument {word!r}")
        key, equals, value = word[2:].partition("=")
        if "." not in key or not parser.get_default("takes_settings"):
            known = [option for action in parser._actions for option in action.option_strings]
            close = difflib.get_close_matches(word, known, n=1)
            parser.error(f"unknown option {word}" + (f"; did you mean {close[0]}?" if close else ""))
        if not equals:
            value = next(words, "")
            if not value:
                parser.error(f"{word} needs a value")
        pairs.append((key, value))
    return pairs


def _parser() -> argparse.ArgumentParser:
    from mixcl_dist import __version__

    parser = argparse.ArgumentParser(
        prog="mixcl",
        description="Pre-train 3D segmentation networks on large CT archives; measure whether it helped.",
        epilog="example:\n  mixcl demo --out runs/demo        the whole path on a phantom cohort, a few minutes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mixcl {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_shards(verbs)
    _add_training(verbs)
    _add_results(verbs)
    _verb(verbs, "doctor", _doctor, "is this machine fit", "mixcl doctor", takes_settings=False)
    config = verbs.add_parser("config", help="look at settings")
    on_config = config.add_subparsers(title="verbs", metavar="VERB", required=True)
    example = "mixcl config show --recipe few_label --finetune.steps 500"
    _verb(on_config, "show", _config_show, "print the resolved settings", example)
    return parser


def _add_shards(verbs: Any) -> None:
    shards = verbs.add_parser("shards", help="build, inspect and verify shards of patches")
    on_shards = shards.add_subparsers(title="verbs", metavar="VERB", required=True)
    example = "mixcl shards build archive/dataset.json more_scans/ --out shards --build.spacing_mm 2,2,2"
    add = _verb(on_shards, "build", _shards_build, "CT volumes → shards of patches", example)
    sources = "dataset.json (MONAI/Decathlon), nnU-Net folder, folder of NIfTI files or of DICOM series"
    add("source", nargs="+", type=Path, metavar="SOURCE", help=sources)
    add("--out", type=Path, required=True, metavar="SHARDS", help="folder to write; going on where it was interrupted")
    for name, function, summary in (
        ("inspect", _shards_inspect, "what a set of shards holds"),
        ("verify", _shards_verify, "check every digest"),
    ):
        add = _verb(on_shards, name, function, summary, f"mixcl shards {name} shards", takes_settings=False)
        add("shards", type=Path, metavar="SHARDS", help="folder made by `mixcl shards build`")


def _add_training(verbs: Any) -> None:
    example = "mixcl pretrain --data shards --run runs/pretrained --pretrain.steps 2000"
    add = _verb(verbs, "pretrain", _pretrain, "pre-train a network on shards", example)
    add(
        "--data", required=True, metavar="SHARDS", help="folder made by `mixcl shards build`, or its http, s3 or gs URL"
    )
    add("--run", type=Path, required=True, metavar="RUN", help="folder of this run")
    add("--resume", choices=["latest"], help="go on from its newest whole checkpoint, with its settings")

    example = "mixcl finetune --data ct/dataset.json --from runs/pretrained --labels 0.05 --seed 0 --run runs/few"
    add = _verb(verbs, "finetune", _finetune, "fine-tune for segmentation with few labels, and score", example)
    data = "labelled cases with a validation split"
    add("--data", type=Path, required=True, metavar="SOURCE", help=data)
    add("--from", dest="start", type=_start, required=True, metavar="RUN|none", help="pre-training run, or none")
    share = "share of the training cases whose labels are used, 0 to 1"
    add("--labels", type=float, required=True, metavar="FRACTION", help=share)
    add("--seed", type=int, default=0, help="which cases these are (default 0)")
    add("--run", type=Path, required=True, metavar="RUN", help="folder of this run")

    example = "mixcl tune --data ct/dataset.json --from runs/pretrained --study runs/study --recipe few_label"
    add = _verb(verbs, "tune", _tune, "run the table of few-label trials under Ray Tune", example)
    add("--data", type=Path, required=True, metavar="SOURCE", help=data)
    starts = "pre-training runs; a trial uses the one that read most labels within the trial's budget"
    add("--from", dest="start", type=Path, nargs="+", required=True, metavar="RUN", help=starts)
    add("--study", type=Path, required=True, metavar="STUDY", help="folder of this study; going on where it stopped")


def _add_results(verbs: Any) -> None:
    summary = "write one self-contained page about a run or a study"
    add = _verb(verbs, "report", _report, summary, "mixcl report runs/study", takes_settings=False)
    add("path", type=Path, metavar="RUN|STUDY", help="its folder; the page goes to report/index.html in it")

    example = "mixcl export runs/few --to monai --out exported"
    add = _verb(verbs, "export", _export, "hand a network to other tools", example, takes_settings=False)
    add("run", type=Path, metavar="RUN", help="pre-training or fine-tuning run")
    add("--to", required=True, choices=["monai", "nnunet", "bundle", "hf"], help="whose form")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")

    add = _verb(verbs, "demo", _demo, "the whole path on a phantom cohort", "mixcl demo --out runs/demo")
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write (default runs/demo)")


def _verb(
    verbs: Any, name: str, function: Callable, summary: str, example: str, takes_settings: bool = True
) -> Callable[..., argparse.Action]:
    """Add a verb with its one-line summary and example; returns its `add_argument`."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=(SETTINGS + "\n" if takes_settings else "") + f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=function, parser=parser, takes_settings=takes_settings)
    if takes_settings:
        parser.add_argument("--recipe", metavar="NAME", help=argparse.SUPPRESS)
        parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help=argparse.SUPPRESS)
    return parser.add_argument


def _start(text: str) -> Path | None:
    return None if text == "none" else Path(text)
