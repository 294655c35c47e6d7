"""`mixcl pretrain`, `probe`, `finetune`, `tune` and `table`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mixcl_dist.arguments import refuse_lost
from mixcl_dist.cli.verbs import add_verb, check_file, config_of, positive, start_of

NO_BUDGET = {"budget.fraction": 0.0, "budget.scans": None, "budget.seed": 0}


def add_training(verbs: Any) -> None:
    example = "mixcl pretrain --data shards --run runs/pretrained --pretrain.steps 2000"
    add = add_verb(verbs, "pretrain", _pretrain, "pre-train a network on shards", example)
    add(
        "--data", required=True, metavar="SHARDS", help="folder made by `mixcl shards build`, or its http, s3 or gs URL"
    )
    add("--run", type=Path, required=True, metavar="RUN", help="folder of this run")
    add("--start", type=Path, metavar="RUN", help="begin with the network of this pre-training run, heads included")
    add("--resume", choices=["latest"], help="go on from its newest whole checkpoint, with its settings")
    add("--plan", type=Path, metavar="PLAN.json", help="what `mixcl plan` says of it: the report tells what came of it")

    example = "mixcl probe runs/pretrained --data shards --recipe few_label"
    add = add_verb(verbs, "probe", _probe, "how good are a network's features, before any fine-tuning?", example)
    add(
        "run", type=start_of, metavar="RUN|none", help="pre-training run, or a checkpoint in it; none: a random network"
    )
    add("--data", required=True, metavar="SHARDS", help="shards that hold budget.development, folder or URL")
    add("--out", type=Path, metavar="JSON", help="file to write (default probe.json in RUN)")

    example = "mixcl finetune --data ct/dataset.json --from runs/pretrained --scans 4 --seed 0 --run runs/few"
    add = add_verb(
        verbs,
        "finetune",
        _finetune,
        "fine-tune for segmentation with few labels, score on development cases (or validation)",
        example,
    )
    data = "labelled cases with a validation split"
    add("--data", type=Path, required=True, metavar="SOURCE", help=data)
    start = "pre-training run, or fine-tuning run (supervised pre-training), a checkpoint of others, or none"
    add("--from", dest="start", type=start_of, required=True, metavar="RUN|FILE|none", help=start)
    scans = "number of training cases whose labels are used (--budget.scans)"
    add("--scans", dest="budget.scans", metavar="N", help=scans)
    add("--labels", dest="budget.fraction", metavar="FRACTION", help="or their share, 0 to 1 (--budget.fraction)")
    add("--seed", dest="budget.seed", metavar="SEED", help="which cases these are (--budget.seed)")
    add("--run", type=Path, required=True, metavar="RUN", help="folder of this run")

    example = "mixcl tune --data ct/dataset.json --from runs/pretrained --study runs/study"
    add = add_verb(verbs, "tune", _tune, "run the table of few-label trials under Ray Tune", example)
    add("--data", type=Path, metavar="SOURCE", help=data)
    starts = "pre-training runs; a trial uses the one that read most labels within the trial's budget"
    add(
        "--from",
        dest="start",
        type=start_of,
        nargs="+",
        action="extend",
        metavar="RUN|none",
        help=starts,
    )
    add("--study", type=Path, metavar="STUDY", help="folder of this study; going on where it stopped")
    shards = "with --from none: pre-train on these shards in the study, so that settings of it may be searched"
    add("--shards", type=Path, metavar="SHARDS", help=shards)
    add("--watch", type=Path, metavar="STUDY", help="show how that study stands while it runs; nothing else is needed")

    example = "mixcl table --data openkbp/dataset.json --shards shards --out runs/table --recipe few_label --workers 2"
    add = add_verb(verbs, "table", _table, "pre-train and fine-tune for the few-label table, resumably", example)
    add("--data", type=Path, required=True, metavar="SOURCE", help="labelled cases with a validation split")
    add("--shards", type=Path, required=True, metavar="SHARDS", help="its training images, by `mixcl shards build`")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of this table; going on where it stopped")
    add("--workers", type=positive, default=1, metavar="N", help="items that are run side by side (default 1)")
    most = "pre-trainings among them at most, which fill a GPU by few (default: no other bound)"
    add("--pretrainings", type=positive, metavar="N", help=most)
    add("--seconds", type=float, metavar="S", help="stop after about so long (default: once all is done)")
    add("--only", metavar="PATTERN", help="names of items to run, with what they need, e.g. 'trial/mixcl-n1-*'")


def _pretrain(options: argparse.Namespace) -> int:
    from mixcl_dist.cluster.group import check_address, described
    from mixcl_dist.cluster.launch.job import REQUEUE
    from mixcl_dist.pretraining.pretrain import pretrain
    from mixcl_dist.pretraining.summary import came_of_plan
    from mixcl_dist.records import METRICS, PretrainRecord, RunPlan, read_metrics, told
    from mixcl_dist.run import Stopped

    check_address(described())
    if options.resume and (options.run / "config.yaml").exists():
        options.config.insert(0, options.run / "config.yaml")
    known = {"start": options.start, "resume": options.resume is not None}
    try:
        plan = RunPlan.read(options.plan) if options.plan else None
        pretrain(config_of(options), shards=options.data, run=options.run, plan=plan, **known)
    except Stopped as stopped:
        if described().rank == 0:
            print(f"mixcl: {stopped}", file=sys.stderr)
        return REQUEUE
    if described().rank == 0:
        for line in came_of_plan(told(PretrainRecord.load(options.run)), read_metrics(options.run / METRICS)):
            print(line)
        print(f"pre-trained network in {options.run}; next: mixcl report {options.run}")
    return 0


def _probe(options: argparse.Namespace) -> None:
    from mixcl_dist.config import replace, to_dict
    from mixcl_dist.pretraining.probe import probe_run, run_of
    from mixcl_dist.records import ProbeRecord
    from mixcl_dist.run import read_config

    config = config_of(options)
    check_file(options, "out")
    if options.run is not None:
        known = read_config(run_of(options.run))
        development = config.budget.development or known.budget.development
        taken = replace(config, {"network": to_dict(known)["network"], "budget.development": development})
        refuse_lost(options, config, taken, f"a probe takes that of {options.run}")
        config = taken
    found = probe_run(options.run, config, shards=options.data)
    out = options.out or (options.run and options.run / ProbeRecord.FILE)
    print(f"{'Dice, frozen features':<24} linear  k-NN")
    rows = [(name, linear, found.knn.dice[name]) for name, linear in found.linear.dice.items()]
    for name, *values in [*rows, ("mean", found.linear.mean, found.knn.mean)]:
        print(f"{name:<24} " + "   ".join("  -  " if value is None else f"{value:.3f}" for value in values))
    if out:
        found.write(out)
    print(f"in {found.seconds:.0f} s{f'; written to {out}' if out else ''}")


def _finetune(options: argparse.Namespace) -> None:
    config = config_of(options)
    from mixcl_dist.finetuning.finetune import finetune
    from mixcl_dist.finetuning.start import like

    if options.start is not None:
        refuse_lost(options, config, like(config, options.start), f"a trial takes that of {options.start}")
    dice = finetune(config, data=options.data, start=options.start, run=options.run)
    for name, value in dice.class_mean.items():
        print(f"{name:<24} {'-' if value is None else f'{value:.3f}'}")
    scored = f"on {len(dice.cases)} {dice.scored} cases"
    mean = "-" if dice.mean is None else f"{dice.mean:.3f}"
    print(f"{'mean Dice':<24} {mean} {scored}    ({options.run}; next: mixcl report {options.run})")


def _tune(options: argparse.Namespace) -> int:
    from mixcl_dist.config import replace
    from mixcl_dist.finetuning.start import like
    from mixcl_dist.report import study_table
    from mixcl_dist.studies.study import run_study
    from mixcl_dist.studies.watching import watch

    if options.watch:
        watch(options.watch)
        return 0
    for name, value in (("--data", options.data), ("--from", options.start), ("--study", options.study)):
        if value is None:
            options.parser.error(f"{name} is missing; give --data, --from and --study, or --watch alone")
    config = config_of(options)
    starts = [start for start in options.start if start is not None]
    if starts:
        refuse_lost(options, config, like(config, starts[0]), f"trials take that of {starts[0]}")
    refuse_lost(
        options, config, replace(config, NO_BUDGET), "study.fractions and study.seeds say which labels are used"
    )
    study = run_study(config, data=options.data, starts=starts, study=options.study, shards=options.shards)
    failed = [trial.id for trial in study.trials if trial.status not in ("done", "stopped", "barred")]
    if failed:
        print(f"mixcl: trials not done: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    print(study_table(options.study))
    print(f"study in {options.study}; next: mixcl report {options.study}")
    return 1 if failed else 0


def _table(options: argparse.Namespace) -> int:
    from mixcl_dist.config import replace
    from mixcl_dist.report import table_text
    from mixcl_dist.studies.table.runner import run_table

    config = config_of(options)
    refuse_lost(options, config, replace(config, NO_BUDGET), "table.scans and table.seeds say which labels are used")
    ending = run_table(
        config,
        data=options.data,
        shards=options.shards,
        out=options.out,
        workers=options.workers,
        seconds=options.seconds,
        only=options.only,
        pretrainings=options.pretrainings,
    )
    print(table_text(options.out))
    print(f"{options.out}: {ending.done} of {ending.planned} planned trials; next: mixcl report {options.out}")
    for name in ending.barred:
        print(f"mixcl: {name} is barred by its pre-training's probe; see the report", file=sys.stderr)
    if ending.left:
        print(f"mixcl: {len(ending.left)} items are left, {ending.left[0]} first", file=sys.stderr)
    if ending.failed:
        print(f"mixcl: failed: {', '.join(ending.failed)}; the same command tries them again", file=sys.stderr)
    return 1 if ending.failed else 0
