"""`mixcl`: verbs → functions. Everything heavy is imported inside the verb that needs it."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import getpass
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mixcl_dist.arguments import parse, refuse_lost

SETTINGS = """settings:
  --recipe NAME            start from a named recipe
  --config FILE            read settings from a YAML file (may be given again; the later wins)
  --section.key VALUE      set one value, e.g. --pretrain.steps 2000 --views.size 32,32,32
  `mixcl config show` prints every section, key and value.
"""

NO_BUDGET = {"budget.fraction": 0.0, "budget.scans": None, "budget.seed": 0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the process's exit code.

    0 done, 1 done with problems, 2 refused, 130 interrupted, be it by SIGTERM; 75 (sysexits.h: try again) asked to
    stop, and to be put into a scheduler's queue again.
    """
    _print_anything()
    _stand_in_for_a_user()
    options = parse(_parser(), list(sys.argv[1:] if arguments is None else arguments))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # else nothing would be said
    try:
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


def _stand_in_for_a_user() -> None:
    """Give a user without an entry in passwd, as of `docker run --user 45678`, the name and the folder for caches that
    libraries ask for when they are imported."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is None or not os.access(home, os.W_OK):
        caches = {"MPLCONFIGDIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"} - os.environ.keys()
        folder = tempfile.TemporaryDirectory(prefix="mixcl-", ignore_cleanup_errors=True)  # nobody else's to write in
        os.environ |= dict.fromkeys(caches, folder.name)
        atexit.register(folder.cleanup)


def _shards_build(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.building.build import build
    from mixcl_dist.progress import ProgressReport

    config = _config(options)
    with _elsewhere(options) as run:
        result = build(
            options.source, options.out, config.build, ProgressReport("build"), exclude=options.exclude, run=run
        )
    manifest = result.manifest
    print(f"{options.out}: {len(manifest.cases)} cases, {manifest.patches} patches, {len(manifest.shards)} shards")
    if result.added < len(manifest.cases):
        print(f"{result.added} cases are new, {result.absent} of the others are in none of these sources and stay")
    if faces := [case.name for case in manifest.cases if case.shows_face]:
        names = ", ".join(faces[:5]) + (", …" if len(faces) > 5 else "")
        print(f"mixcl: {len(faces)} cases show a face, by which a patient can be known: {names}", file=sys.stderr)
    for problem in result.quarantined:
        print(f"quarantined: {problem}", file=sys.stderr)
    if result.quarantined:
        listing = options.out / ".build" / "quarantine.jsonl"
        print(f"mixcl: {len(result.quarantined)} quarantined, listed in {listing}", file=sys.stderr)
    shown = ", ".join(f"{count} {what}" for what, count in result.files.items())
    print(f"{sum(result.files.values())} files seen: {shown}")
    return 1 if result.quarantined else 0


def _elsewhere(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """Where a build's work runs: on a Ray cluster, or (None) where the build itself does."""
    if options.ray is None:
        return nullcontext()
    from mixcl_dist.cluster.work import on_ray

    return on_ray(options.ray, written=options.out, read=[*options.source, *options.exclude])


def _shards_inspect(options: argparse.Namespace) -> None:
    from mixcl_dist.data_shards.inspection.summary import inspect, table

    if options.window[0] >= options.window[1]:
        options.parser.error(f"--window {options.window[0]:g} {options.window[1]:g}: give the lower HU first")
    print(table(inspect(options.shards)))
    if options.picture:
        from mixcl_dist.data_shards.inspection.picture import contact_sheet

        contact_sheet(options.shards, options.picture, options.window)
        print(f"picture in {options.picture}")


def _shards_verify(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.format.shard import ANEW
    from mixcl_dist.data_shards.inspection.verify import verify
    from mixcl_dist.progress import ProgressReport

    problems = verify(options.shards, _cores(), ProgressReport("verify"))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{options.shards}: {'whole' if not problems else f'{len(problems)} problems; {ANEW}'}")
    return 1 if problems else 0


def _shards_dedup(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.building.dedup import matches, scans_of
    from mixcl_dist.data_shards.building.processes import in_processes
    from mixcl_dist.progress import ProgressReport

    paths = dict.fromkeys([*options.source, *options.against])
    scans = scans_of(list(paths), in_processes(_cores()), ProgressReport("dedup"), whole=options.against)
    ones, others = (
        [scan for scan in scans.found if Path(scan.origin) in group] for group in (options.source, options.against)
    )
    found = matches(ones, others)
    for match in found:
        print(match)
    for problem in scans.problems:
        print(f"not compared: {problem}", file=sys.stderr)
    print(f"{len(found)} pairs are one scan; {len(ones)} scans held against {len(others)}")
    return 1 if found or scans.problems else 0


def _shards_trace(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.sources import open_source
    from mixcl_dist.data_shards.sources.pseudonym import KEY_VARIABLE, traced
    from mixcl_dist.data_shards.volume import shown

    files = traced() | {case.name: case.files[0] for path in options.source for case in open_source(path).cases}
    if options.name in files:
        print(shown(files[options.name]))
        return 0
    cure = f"name the sources that it was built from, and set {KEY_VARIABLE} as it was then"
    print(f"mixcl: {options.name}: no build of this user has named a scan so; {cure}", file=sys.stderr)
    return 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pretrain(options: argparse.Namespace) -> int:
    from mixcl_dist.cluster.launch.job import REQUEUE
    from mixcl_dist.pretraining.pretrain import pretrain
    from mixcl_dist.run import Stopped

    if options.resume and (options.run / "config.yaml").exists():
        options.config.insert(0, options.run / "config.yaml")
    resume = options.resume is not None
    try:
        pretrain(_config(options), shards=options.data, run=options.run, start=options.start, resume=resume)
    except Stopped as stopped:
        print(f"mixcl: {stopped}", file=sys.stderr)
        return REQUEUE
    print(f"pre-trained network in {options.run}; next: mixcl report {options.run}")
    return 0


def _probe(options: argparse.Namespace) -> None:
    from mixcl_dist.config import replace, to_dict
    from mixcl_dist.pretraining.probe import probe_run, run_of
    from mixcl_dist.records import ProbeRecord
    from mixcl_dist.run import read_config

    config = _config(options)
    if options.out and not options.out.parent.is_dir():
        options.parser.error(f"--out {options.out}: its folder does not exist; make it first")
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
    print(f"in {found.seconds:.0f} s")
    if out:
        found.write(out)


def _finetune(options: argparse.Namespace) -> None:
    config = _config(options)
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

    config = _config(options)
    refuse_lost(options, config, like(config, options.start[0]), f"trials take that of {options.start[0]}")
    refuse_lost(
        options, config, replace(config, NO_BUDGET), "study.fractions and study.seeds say which labels are used"
    )
    study = run_study(config, data=options.data, starts=options.start, study=options.study)
    failed = [trial.id for trial in study.trials if trial.status != "done"]
    if failed:
        print(f"mixcl: trials not done: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    print(study_table(options.study))
    print(f"study in {options.study}; next: mixcl report {options.study}")
    return 1 if failed else 0


def _table(options: argparse.Namespace) -> int:
    from mixcl_dist.config import replace
    from mixcl_dist.report import table_text
    from mixcl_dist.studies.table.runner import run_table

    config = _config(options)
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


def _report(options: argparse.Namespace) -> None:
    from mixcl_dist.report import write_report

    print(write_report(options.path))


def _export(options: argparse.Namespace) -> None:
    from mixcl_dist.export import export

    print(export(options.run, options.to, options.out))


def _demo(options: argparse.Namespace) -> None:
    from mixcl_dist.demo import demo

    demo(_config(options, recipe="demo"), options.out)


def _launch(options: argparse.Namespace) -> int:
    from mixcl_dist.cluster.launch.job import Job

    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    job = Job(tuple(words), options.nodes, options.processes or options.gpus or 1, options.gpus, options.threads)
    return options.launch(options, job)


def _launch_hosts(options: argparse.Namespace, job: Any) -> int:
    import shlex

    from mixcl_dist.cluster.launch import hosts

    names = hosts.read_hosts(options.hosts) if options.hosts else []
    commands = hosts.commands(dataclasses.replace(job, nodes=len(names) or 1), names, port=options.port)
    if options.dry_run:
        print("\n".join(shlex.join(command) for command in commands))
        return 0
    return hosts.run(commands, job.environment)


def _launch_slurm(options: argparse.Namespace, job: Any) -> int:
    from mixcl_dist.cluster.launch.slurm import Allocation, script, submit

    known = {"time": options.time, "partition": options.partition, "account": options.account}
    site = Allocation(**known, warning_s=options.warning, options=tuple(options.sbatch), container=options.container)
    text = script(job, site)
    if options.dry_run:
        print(text, end="")
    else:
        number = submit(text, Path.cwd())
        print(f"job {number}; its log: {job.name}-{number}.log; next: squeue --job {number}")
    return 0


def _launch_kubernetes(options: argparse.Namespace, job: Any) -> int:
    from mixcl_dist.cluster.launch.kubernetes import Cluster, apply, manifests, ray_job

    place = {"mounted": options.mounted, "namespace": options.namespace, "memory_gib": options.memory_gib}
    cluster = Cluster(image=options.image, claim=options.claim, **place)
    text = ray_job(job, cluster) if options.ray_job else manifests(job, cluster)
    print(text if options.dry_run else apply(text), end="")
    return 0


def _launch_ray(options: argparse.Namespace, job: Any) -> int:
    from mixcl_dist.cluster.launch import ray

    if options.dry_run:
        print(f"{job.nodes} x {job.processes} processes on {options.address}: mixcl {' '.join(job.command)}")
    else:
        ray.run(job, main, address=options.address, failures=options.failures)
    return 0


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
    print(manual(_config(options), given, options.section), end="")


def _config(options: argparse.Namespace, recipe: str | None = None) -> Any:
    from mixcl_dist.config import load

    return load(*options.config, recipe=options.recipe or recipe, overrides=options.overrides)


def _print_anything() -> None:
    """On a terminal that cannot show a character, print a stand-in rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def _parser() -> argparse.ArgumentParser:
    from mixcl_dist import __version__

    parser = argparse.ArgumentParser(
        prog="mixcl",
        allow_abbrev=False,
        description="Pre-train 3D segmentation networks on large CT archives; measure whether it helped.",
        epilog="example:\n  mixcl demo --out runs/demo        the whole path on a phantom cohort, a few minutes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mixcl {__version__}")
    verbs = _add_verbs(parser)
    _add_shards(verbs)
    _add_training(verbs)
    _add_results(verbs)
    _add_launch(verbs)
    _verb(verbs, "doctor", _doctor, "is this machine fit", "mixcl doctor", takes_settings=False)
    config = verbs.add_parser("config", allow_abbrev=False, help="look at settings")
    on_config = _add_verbs(config)
    example = "mixcl config show finetune --recipe few_label --finetune.steps 500"
    add = _verb(on_config, "show", _config_show, "print and explain the settings, and where each is from", example)
    add("section", nargs="?", metavar="SECTION", help="one section, in full (default: all, in brief)")
    return parser


def _add_shards(verbs: Any) -> None:
    shards = verbs.add_parser("shards", allow_abbrev=False, help="build, inspect, verify and compare shards of patches")
    on_shards = _add_verbs(shards)
    example = "mixcl shards build archive/dataset.json more_scans/ --out shards --build.spacing_mm 2,2,2"
    add = _verb(on_shards, "build", _shards_build, "CT volumes → shards of patches, or more of them", example)
    sources = "dataset.json (MONAI/Decathlon), nnU-Net folder, folder of masks, or of NIfTI, NRRD, MetaImage, DICOM"
    add("source", nargs="+", type=Path, metavar="SOURCE", help=sources)
    out = "folder to write; going on where it was interrupted, appending what is new"
    add("--out", type=Path, required=True, metavar="SHARDS", help=out)
    exclude = "sources or shards all of whose scans are kept out, those to test on too, under whatever name (see dedup)"
    add("--exclude", nargs="+", action="extend", type=Path, default=[], metavar="LIST", help=exclude)
    ray = "work on the Ray cluster at ADDRESS (default auto), which must see SOURCE and SHARDS as this machine does"
    add("--ray", nargs="?", const="auto", metavar="ADDRESS", help=ray)

    folder = "folder made by `mixcl shards build`"
    example = "mixcl shards inspect shards --picture sheet.png"
    add = _verb(on_shards, "inspect", _shards_inspect, "what a set of shards holds", example, takes_settings=False)
    add("shards", type=Path, metavar="SHARDS", help=folder)
    add("--picture", type=Path, metavar="PNG", help="draw middle slices of patches from different cases, with labels")
    window = "HU that are black and white in the picture (default -160 240)"
    add("--window", nargs=2, type=float, default=(-160.0, 240.0), metavar=("LOW", "HIGH"), help=window)

    summary, example = "check every digest", "mixcl shards verify shards"
    add = _verb(on_shards, "verify", _shards_verify, summary, example, takes_settings=False)
    add("shards", type=Path, metavar="SHARDS", help=folder)

    summary = "find scans that come twice, also resampled, clipped or cropped a little"
    example = "mixcl shards dedup shards --against test/dataset.json"
    add = _verb(on_shards, "dedup", _shards_dedup, summary, example, takes_settings=False)
    add("source", nargs="+", type=Path, metavar="SHARDS|SOURCE", help="shards, or what shards are to be built from")
    add(
        "--against",
        nargs="+",
        action="extend",
        type=Path,
        required=True,
        metavar="LIST",
        help="the same, of the cases to test on: every image it names",
    )

    summary, example = "which file a pseudonym stands for", "mixcl shards trace ct-4b08f21ad3991b27 archive/"
    add = _verb(on_shards, "trace", _shards_trace, summary, example, takes_settings=False)
    add("name", metavar="PSEUDONYM", help="name of a case, as messages and shards have it")
    add("source", nargs="*", type=Path, metavar="SOURCE", help="where to look beside what builds have kept")


def _add_training(verbs: Any) -> None:
    example = "mixcl pretrain --data shards --run runs/pretrained --pretrain.steps 2000"
    add = _verb(verbs, "pretrain", _pretrain, "pre-train a network on shards", example)
    add(
        "--data", required=True, metavar="SHARDS", help="folder made by `mixcl shards build`, or its http, s3 or gs URL"
    )
    add("--run", type=Path, required=True, metavar="RUN", help="folder of this run")
    add("--start", type=Path, metavar="RUN", help="begin with the network of this pre-training run, heads included")
    add("--resume", choices=["latest"], help="go on from its newest whole checkpoint, with its settings")

    example = "mixcl probe runs/pretrained --data shards --recipe few_label"
    add = _verb(verbs, "probe", _probe, "how good are a network's features, before any fine-tuning?", example)
    add("run", type=_start, metavar="RUN|none", help="pre-training run, or a checkpoint in it; none: a random network")
    add("--data", required=True, metavar="SHARDS", help="shards that hold budget.development, folder or URL")
    add("--out", type=Path, metavar="JSON", help="file to write (default probe.json in RUN)")

    example = "mixcl finetune --data ct/dataset.json --from runs/pretrained --scans 4 --seed 0 --run runs/few"
    add = _verb(
        verbs,
        "finetune",
        _finetune,
        "fine-tune for segmentation with few labels, score on development cases (or validation)",
        example,
    )
    data = "labelled cases with a validation split"
    add("--data", type=Path, required=True, metavar="SOURCE", help=data)
    start = "pre-training run, or fine-tuning run (supervised pre-training), or none"
    add("--from", dest="start", type=_start, required=True, metavar="RUN|none", help=start)
    scans = "number of training cases whose labels are used (--budget.scans)"
    add("--scans", dest="budget.scans", metavar="N", help=scans)
    add("--labels", dest="budget.fraction", metavar="FRACTION", help="or their share, 0 to 1 (--budget.fraction)")
    add("--seed", dest="budget.seed", metavar="SEED", help="which cases these are (--budget.seed)")
    add("--run", type=Path, required=True, metavar="RUN", help="folder of this run")

    example = "mixcl tune --data ct/dataset.json --from runs/pretrained --study runs/study"
    add = _verb(verbs, "tune", _tune, "run the table of few-label trials under Ray Tune", example)
    add("--data", type=Path, required=True, metavar="SOURCE", help=data)
    starts = "pre-training runs; a trial uses the one that read most labels within the trial's budget"
    add("--from", dest="start", type=Path, nargs="+", action="extend", required=True, metavar="RUN", help=starts)
    add("--study", type=Path, required=True, metavar="STUDY", help="folder of this study; going on where it stopped")

    example = "mixcl table --data openkbp/dataset.json --shards shards --out runs/table --recipe few_label --workers 2"
    add = _verb(verbs, "table", _table, "pre-train and fine-tune for the few-label table, resumably", example)
    add("--data", type=Path, required=True, metavar="SOURCE", help="labelled cases with a validation split")
    add("--shards", type=Path, required=True, metavar="SHARDS", help="its training images, by `mixcl shards build`")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of this table; going on where it stopped")
    add("--workers", type=_positive, default=1, metavar="N", help="items that are run side by side (default 1)")
    most = "pre-trainings among them at most, which fill a GPU by few (default: no other bound)"
    add("--pretrainings", type=_positive, metavar="N", help=most)
    add("--seconds", type=float, metavar="S", help="stop after about so long (default: once all is done)")
    add("--only", metavar="PATTERN", help="names of items to run, with what they need, e.g. 'trial/mixcl-n1-*'")


def _add_results(verbs: Any) -> None:
    summary = "write one self-contained page about a run, a study or a table"
    add = _verb(verbs, "report", _report, summary, "mixcl report runs/study", takes_settings=False)
    add("path", type=Path, metavar="RUN|STUDY|TABLE", help="its folder; the page goes to report/index.html in it")

    example = "mixcl export runs/few --to monai --out exported"
    add = _verb(verbs, "export", _export, "hand a network to other tools", example, takes_settings=False)
    add("run", type=Path, metavar="RUN", help="pre-training or fine-tuning run")
    add("--to", required=True, choices=["monai", "nnunet", "bundle", "hf"], help="whose form")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")

    add = _verb(verbs, "demo", _demo, "the whole path on a phantom cohort", "mixcl demo --out runs/demo")
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write (default runs/demo)")


def _add_verbs(parser: argparse.ArgumentParser, metavar: str = "VERB") -> Any:
    verbs = parser.add_subparsers(title=f"{metavar.lower()}s", metavar=metavar, required=True)
    parser.set_defaults(verbs=verbs)
    return verbs


def _add_launch(verbs: Any) -> None:
    launch = verbs.add_parser(
        "launch", allow_abbrev=False, help="pre-train on several machines: hosts, SLURM, Kubernetes, Ray"
    )
    on_launch = _add_verbs(launch, "WHERE")
    behind = "-- pretrain --data shards --run runs/a"

    def way(name: str, function: Callable, summary: str, example: str) -> Callable[..., argparse.Action]:
        add = _verb(on_launch, name, _launch, summary, f"mixcl launch {example} {behind}", takes_settings=False)
        on_launch.choices[name].set_defaults(launch=function)
        add("--gpus-per-node", dest="gpus", type=int, default=0, metavar="N", help="default 0: on CPUs")
        add("--processes", type=_positive, metavar="N", help="processes of a node (default: one for each GPU, or 1)")
        add("--threads", type=_positive, default=1, metavar="N", help="CPU cores of each process (default 1)")
        add("--dry-run", action="store_true", help="print what would be started")
        return add

    def nodes(add: Callable[..., argparse.Action]) -> None:
        add("--nodes", type=_positive, default=1, metavar="N", help="machines (default 1)")

    def command(add: Callable[..., argparse.Action]) -> None:
        add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="a mixcl command, its settings with it")

    add = way("local", _launch_hosts, "this machine", "local --processes 2")
    on_launch.choices["local"].set_defaults(nodes=1, hosts=None, port=None)
    command(add)

    add = way("hosts", _launch_hosts, "hosts that ssh reaches", "hosts --hosts a,b --gpus-per-node 8")
    add("--hosts", required=True, metavar="A,B|FILE", help="which see the same folders; all meet at the first")
    add("--port", type=_positive, default=29511, metavar="PORT", help="where the first host listens (default 29511)")
    on_launch.choices["hosts"].set_defaults(nodes=1)
    command(add)

    add = way("slurm", _launch_slurm, "a SLURM cluster", "slurm --nodes 2 --gpus-per-node 8 --time 1-0")
    nodes(add)
    add("--time", metavar="TIME", help="of one turn; a run that is not done by then gets another")
    add("--partition", metavar="NAME", help="see sbatch")
    add("--account", metavar="NAME", help="see sbatch")
    add("--warning", type=_positive, default=120, metavar="S", help="seconds for saving before a turn's end (120)")
    add("--container", metavar="IMAGE", help="image to run in (pyxis)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="a further option, as --sbatch=--constraint=x")
    command(add)

    add = way(
        "kubernetes", _launch_kubernetes, "a Kubernetes cluster", "kubernetes --image I --claim archive --nodes 2"
    )
    nodes(add)
    add("--image", required=True, metavar="IMAGE", help="with mixcl-dist in it")
    add("--claim", required=True, metavar="NAME", help="PersistentVolumeClaim of shards and runs, ReadWriteMany")
    add("--mounted", default="/data", metavar="FOLDER", help="where pods see it, and start (default /data)")
    add("--namespace", metavar="NAME", help="default: kubectl's")
    add("--memory-gib", type=_positive, default=32, metavar="GIB", help="memory of a node's pod (default 32)")
    add("--ray-job", action="store_true", help="as a RayJob of the KubeRay operator")
    command(add)

    add = way("ray", _launch_ray, "a Ray cluster that is there", "ray --address auto --nodes 2 --gpus-per-node 8")
    nodes(add)
    add("--address", default="auto", metavar="ADDRESS", help="auto or host:port (default auto)")
    add("--failures", type=int, default=3, metavar="N", help="how often to start again where a machine is lost (3)")
    command(add)


def _verb(
    verbs: Any, name: str, function: Callable, summary: str, example: str, takes_settings: bool = True
) -> Callable[..., argparse.Action]:
    """Add a verb with its one-line summary and example; returns its `add_argument`."""
    parser = verbs.add_parser(
        name,
        allow_abbrev=False,
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; give 1 or more")
    return int(text)


def _start(text: str) -> Path | None:
    return None if text == "none" else Path(text)
