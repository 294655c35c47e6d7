"""Runs a table's items side by side, in whatever time there is, and goes on where an earlier call ended."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

from mixcl_dist.budget import training_cases
from mixcl_dist.config import Config, ConfigError, replace, to_dict, to_yaml
from mixcl_dist.data_shards.building.dedup import scans_of_shards
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.sources import Source, open_source
from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.task import Task, budgeted, open_task
from mixcl_dist.jsonfiles import write_atomic
from mixcl_dist.networks.architectures import check_size
from mixcl_dist.pretraining.pretrain import check_batches, check_settings
from mixcl_dist.records import DiceRecord, PlannedItem, PlanRecord, ProbeRecord
from mixcl_dist.run import CONFIG, begin, held, machine, now
from mixcl_dist.seen import KnownScans, Seen, check_split, likeness, one_patient, shared_scans
from mixcl_dist.settings import NetworkConfig
from mixcl_dist.studies.ledger import Ledger, digest_of
from mixcl_dist.studies.table import programs
from mixcl_dist.studies.table.plan import Item, plan
from mixcl_dist.studies.table.work import FINISHED

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ("networks/*.py", "intensity.py", "constants.py", "precision.py", "weights.py")
LEARNING = (*NETWORK, "schedule.py", "budget.py")
SEGMENTING = (
    *LEARNING,
    "linear.py",
    *(
        f"finetuning/{name}.py"
        for name in (
            *("__init__", "finetune", "task", "start", "cases"),
            *("crops", "foreign", "interrupted", "marginal", "scoring", "segmenter", "sliding"),
        )
    ),
    *("data_shards/volume.py", "data_shards/catalogue.py", "data_shards/sources/*.py"),
)
READING = (
    *(f"data_shards/{name}.py" for name in ("streaming/reader", "streaming/order", "catalogue")),
    *(f"data_shards/format/{name}.py" for name in ("codec", "shard", "manifest")),
)
CONTRASTING = (
    *LEARNING,
    *(f"pretraining/{name}.py" for name in ("pretrain", "views", "rows", "draws", "objective")),
    *("cluster/engine.py", "cluster/state.py"),
    *("kernels/*.py", "data_shards/streaming/stream.py", "data_shards/streaming/ring.py"),
    *READING,
)
SOURCES = {
    "pretrain": CONTRASTING,
    "supervised": SEGMENTING,
    "trial": SEGMENTING,
    "probe": ("pretraining/probe.py", "linear.py", *NETWORK, *READING),
}
"""Files on whose content the figures of each kind of item depend."""
SETTINGS = {
    "pretrain": ("data", "network", "views", "rows", "objective", "optimizer", "budget", "engine", "pretrain"),
    "supervised": ("network", "budget", "finetune"),
    "trial": ("network", "budget", "finetune"),
    "probe": ("network", "budget"),
}
"""Sections on which they depend."""
WITHOUT_EFFECT = {
    "budget": ("distinct_patients",),
    "data": ("workers", "cache", "max_bad_fraction"),
    "pretrain": ("log_every", "sample_every", "probe_every", "gradient_norms_every"),
    "finetune": ("log_every",),
}
LOOK_EVERY = 0.2
"""Seconds between two looks at the running processes."""


@dataclass(frozen=True)
class Ending:
    """What a call of `run_table` came to."""

    done: int
    planned: int
    """Trials of the whole table."""
    failed: tuple[str, ...]
    barred: tuple[str, ...]
    left: tuple[str, ...]
    """Chosen items for which there was no time, or which need one that failed."""


def run_table(
    config: Config,
    *,
    data: Path,
    shards: Path,
    out: Path,
    workers: int = 1,
    seconds: float | None = None,
    only: str | None = None,
    pretrainings: int | None = None,
    command: Callable[[Path, str], Sequence[str]] | None = None,
) -> Ending:
    """Run what the table in the folder `out` lacks, `workers` items side by side, for at most `seconds`.

    `only` is a pattern of names (`trial/mixcl-n1-*`); what those items need is run, too. At most `pretrainings` (None:
    `workers`) of the items side by side are pre-trainings. Every item is a process, begun by `command(out, name)` and
    recorded in `out/ledger.jsonl` as soon as it has ended. The folder may be gone on with at any time, after SIGKILL,
    too: a pre-training goes on from its checkpoint, any other item begins anew. No item is begun that is expected to
    last longer than the time left, except a pre-training, which loses nothing.
    Raises `ConfigError`, `RunError`, `CaseError` or `ManifestError`, in one line, before anything is run.
    """
    manifest = Manifest.load(shards)
    if config.finetune.spacing_mm is None:  # without it, scratch would see other voxels than the arms with a start
        config = replace(config, {"finetune.spacing_mm": manifest.spacing_mm})
    items = plan(config)
    chosen = _chosen(items, only)
    question = _question(config, data.resolve(), shards.resolve(), manifest.digest)
    _check_items(config, items, shards, manifest)
    with held(out, "--out"):
        known = KnownScans(out / "trial")  # where the trials look for it
        task = open_task(data, config)
        labelled = budgeted(task, dataclasses.replace(config.budget, fraction=1.0, scans=None))
        check_split(task.cases, labelled, task.held_out, known)
        if any(item.kind == "pretrain" for item in items.values()):
            refuse_held_out(config, task, data, shards, manifest, known)
        digests = _digests(config, items, question["digest"])
        _begin(out, config, question, items, digests)
        (out / "trial").mkdir(exist_ok=True)
        known.save()
        queue = Queue(config, items, digests, out.resolve(), workers, pretrainings or workers, command or _command)
        queue.run(chosen, seconds)
        return queue.ending(chosen)


def _chosen(items: dict[str, Item], only: str | None) -> list[str]:
    if only is None:
        return [name for name, item in items.items() if item.kind == "trial"]
    names = fnmatch.filter(items, only)
    if not names:
        arms = ", ".join(dict.fromkeys(item.arm for item in items.values() if item.arm))
        raise RunError(f"--only {only}: matches no item, e.g. {next(reversed(items))}; arms: {arms}")
    return names


def _question(config: Config, data: Path, shards: Path, manifest_digest: str) -> dict[str, Any]:
    """What the table is about; `digest` stands for everything in it that its figures depend on."""
    source = open_source(data)
    if source.problems:
        raise source.problems[0]
    _check_data(config, data, source)
    cases = [[case.name, case.split, *sorted(case.reliable)] for case in source.cases]
    return {"data": str(data), "shards": str(shards), "digest": digest_of(ROOT, (), cases, manifest_digest)}


def _check_data(config: Config, data: Path, source: Source) -> None:
    """Raise `ConfigError` or `CaseError` for what would fail in a trial, after its pre-training: too few labelled
    scans, or classes and development scans that are not in the data set."""
    others = config.table.other_organs
    blocks = [(config.table.scans, config)] if config.table.arms else []
    for name, fold in others.folds.items():
        if unknown := [organ for organ in (*fold.known, *fold.new) if organ not in source.classes]:
            known = ", ".join(source.classes)
            raise ConfigError(f"table.other_organs.folds.{name}: there is no class {unknown[0]}; classes: {known}")
        blocks.append((others.scans, replace(config, {"finetune.classes": list(fold.new)})))
    for scans, block in blocks:
        budgeted(open_task(data, block), dataclasses.replace(config.budget, fraction=0.0, scans=max(scans)))
    if not config.table.final and not config.budget.development:
        raise ConfigError("table.final is false, but budget.development names no scans to score; name some")


def _check_items(config: Config, items: dict[str, Item], shards: Path, manifest: Manifest) -> None:
    """Raise `ConfigError` for what an item would refuse by its settings, once those before it have been run."""
    networks: dict[str, NetworkConfig] = {}
    for item in items.values():  # each after that which it starts from, whose network it takes
        own = replace(config, item.settings)
        networks[item.name] = networks[item.start] if item.start else own.network
        own = dataclasses.replace(own, network=networks[item.name])
        try:
            if item.kind == "pretrain":
                check_settings(own, manifest)
                check_batches(own, shards, manifest)
            elif item.kind != "probe":  # patches that a view fits into can be probed
                check_size("finetune.patch_size", own.network, own.finetune.patch_size)
        except ConfigError as refused:
            raise ConfigError(f"{item.name}: {refused}") from None


def refuse_held_out(
    config: Config, task: Task, data: Path, shards: Path, manifest: Manifest, known: KnownScans
) -> None:
    """Raise `RunError` where pre-training would see a validation or development scan, under whatever name: every trial
    would refuse such a start, after it is trained."""
    trained = set(training_cases(manifest.cases, config.budget))
    scans = [scan for scan in scans_of_shards(shards) if scan.name in trained]
    held_out = known.of([case for case in task.cases if case.name in task.held_out])
    distinct = config.budget.distinct_patients
    shared = one_patient(shared_scans(Seen(tuple(scans), (frozenset(),) * len(scans)), held_out), distinct)
    if shared:
        case, scan = shared[0].case, shared[0].scan
        how, otherwise = likeness(shared[0], distinct, f"{shlex.quote(str(shards))} --against {shlex.quote(str(data))}")
        cure = {"validation": "build them with --exclude", "development": "name it as they do in budget.development"}
        split = task.held_out[case]
        raise RunError(f"{shards}: {scan.name} is {split} case {case} of {data} ({how}); {cure[split]}{otherwise}")


def _digests(config: Config, items: dict[str, Item], data_digest: str) -> dict[str, str]:
    """Of all that each item's figures depend on."""
    digests: dict[str, str] = {}
    for item in items.values():  # each after that which it starts from
        tree = to_dict(replace(config, item.settings))
        settings: list[Any] = [
            {key: value for key, value in tree.get(section, {}).items() if key not in WITHOUT_EFFECT.get(section, ())}
            for section in SETTINGS[item.kind]
        ]
        if item.kind == "trial":
            settings.append(config.table.final)
        before = digests[item.start] if item.start else None
        digests[item.name] = digest_of(ROOT, SOURCES[item.kind], settings, before, data_digest)
    return digests


def _begin(
    out: Path, config: Config, question: dict[str, Any], items: dict[str, Item], digests: dict[str, str]
) -> None:
    """Write down the question, or compare it with that of an earlier call; raises `RunError` for another one.

    Digests may have changed since: what they are of is made again.
    """
    earlier = PlanRecord.load_if_there(out)
    listed = [PlannedItem(**asdict(item)) for item in items.values()]
    if earlier is None:
        begin(out)
    elif (earlier.digest, [dataclasses.replace(item, digest=None) for item in earlier.items]) != (
        question["digest"],
        listed,
    ):
        what = "trials" if earlier.digest == question["digest"] else "cases or shards"
        raise RunError(f"{out}: holds a table of other {what}; give another --out, or the settings in its config.yaml")
    write_atomic(out / CONFIG, to_yaml(config).encode())
    PlanRecord(
        name=out.resolve().name,
        started=earlier.started if earlier else now(),
        **question,
        table=config.table,
        items=tuple(dataclasses.replace(item, digest=digests[item.name]) for item in listed),
    ).save(out)


@dataclass
class Running:
    process: Popen
    item: Item
    log: Path
    begun: float = field(default_factory=time.monotonic)


class Queue:
    """The items of a table, what the ledger knows of them, and the processes at work."""

    def __init__(
        self,
        config: Config,
        items: dict[str, Item],
        digests: dict[str, str],
        out: Path,
        workers: int,
        pretrainings: int,
        command: Callable[[Path, str], Sequence[str]],
    ) -> None:
        self.items, self.digests, self.out, self.command = items, digests, out, command
        self.workers, self.pretrainings = workers, pretrainings
        self.margin, self.machine = config.table.margin, machine()
        self.ledger = Ledger(out / "ledger.jsonl")
        self.steps = {name: _steps(replace(config, item.settings), item) for name, item in items.items()}
        self.running: list[Running] = []
        self.tried: set[str] = set()
        self.wait_for: list[str] = []

    def state(self, name: str) -> str:
        """One of `STATES`; what is done, but whose files are gone though others need them, is missing."""
        state = self.ledger.state(name, self.digests[name])
        item = self.items[name]
        if item.kind == "probe":
            there = "linear" in self.ledger.records.get(name, {})
        else:
            there = (self.out / name / FINISHED[item.kind]).exists()
        return "missing" if state == "done" and not there else state

    def wanted(self, chosen: Sequence[str]) -> list[str]:
        """The chosen items that are not done and all that they need now, in the order in which they are run.

        A trial needs first the probes of its gate, and what it starts from only once they have let it through.
        """
        names: set[str] = set()
        for name in reversed(self.items):  # an item's needs come before it
            item = self.items[name]
            if (name in chosen or name in names) and self.state(name) != "done":
                names |= {name, *item.gate}
                if item.start and self._passes(item):
                    names.add(item.start)
        return [name for name in self.items if name in names and self.state(name) != "done"]

    def run(self, chosen: Sequence[str], seconds: float | None) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        self._look_ahead(chosen)
        self._tell_of_stale()
        try:
            while self._start_what_can_be(end) or self.running:
                if self._collect():
                    self._look_ahead(chosen)
                if end is not None and time.monotonic() >= end:
                    break
                time.sleep(LOOK_EVERY)
        finally:
            for running in self.running:
                programs.kill(running.process)
                running.process.wait()
            self.running = []

    def _look_ahead(self, chosen: Sequence[str]) -> None:
        """What there is to do, and has been done; bars the trials that their gates have not let through."""
        wanted = set(self.wanted(chosen))
        self.wait_for = [n for n in self.items if n in wanted or (n in self.wait_for and self.state(n) == "done")]
        for name in self.wait_for:
            if self._passes(self.items[name]) is False and name not in self.tried:
                self.tried.add(name)
                self._bar(self.items[name])

    def _tell_of_stale(self) -> None:
        stale = [name for name in self.wait_for if self.ledger.state(name, self.digests[name]) == "stale"]
        if stale:
            self._say(f"{len(stale)} items were made by other sources or settings and are made again, e.g. {stale[0]}")

    def _start_what_can_be(self, end: float | None) -> bool:
        """Fill the workers with the first items that may begin; returns whether one was begun."""
        begun = False
        for name in [name for name in self.wait_for if name not in self.tried]:
            if len(self.running) == self.workers or (end is not None and time.monotonic() >= end):
                break
            item = self.items[name]
            if any(self.state(need) != "done" for need in item.needs) or self._is_one_too_many(item):
                continue
            if end is None or item.kind == "pretrain" or self.expected(item) <= end - time.monotonic():
                self._start(item)
                begun = True
        return begun

    def _is_one_too_many(self, item: Item) -> bool:
        return item.kind == "pretrain" and self.pretrainings <= sum(r.item.kind == "pretrain" for r in self.running)

    def _start(self, item: Item) -> None:
        self.tried.add(item.name)
        log = self.out / "logs" / f"{item.name.replace('/', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        self._make_room(item)
        self.ledger.add(item.name, self.digests[item.name], "begun")
        share = max(1, self.machine.cores // self.workers)
        path = os.pathsep.join(filter(None, [str(ROOT.parent), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": str(share), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        with log.open("w", encoding="utf-8") as output:
            process = programs.start(self.command(self.out, item.name), environment=environment, output=output)
        self.running.append(Running(process, item, log))

    def _make_room(self, item: Item) -> None:
        """Put aside what an earlier call left of other sources or settings: nothing that took time is deleted."""
        folder, record = self.out / item.name, self.ledger.records.get(item.name)
        if record and record["digest"] != self.digests[item.name] and folder.exists():
            aside = self.out / "superseded"
            aside.mkdir(exist_ok=True)
            name = f"{item.name.replace('/', '-')}-{record['digest']}"
            times = len(list(aside.glob(f"{name}*")))  # settings may have been changed to and fro
            folder.rename(aside / (f"{name}-{times + 1}" if times else name))

    def _collect(self) -> bool:
        """Record the items whose processes have ended; returns whether one had."""
        ended = [running for running in self.running if running.process.poll() is not None]
        for running in ended:
            self.running.remove(running)
            item, seconds = running.item, time.monotonic() - running.begun
            ran = self.out / ((item.kind == "probe" and item.start) or item.name)
            try:
                if running.process.returncode or not (ran / FINISHED[item.kind]).exists():
                    last = programs.last_line(running.log)
                    raise RunError(last or f"exit code {running.process.returncode}, no output")
                self._record(item, "done", seconds, **_figures(item, ran))
            except RunError as error:
                self._record(item, "failed", seconds, text=str(error))
        return bool(ended)

    def _record(self, item: Item, status: str, seconds: float, **figures: Any) -> None:
        facts = {"seconds": round(seconds, 1), "steps": self.steps[item.name], "date": now()}
        facts["machine"] = asdict(self.machine)
        record = self.ledger.add(item.name, self.digests[item.name], status, **figures, **facts)
        done = sum(self.state(name) == "done" for name in self.wait_for)
        self._say(f"{item.name}: {record.get('text')} ({seconds:.0f} s; {done}/{len(self.wait_for)} items)")

    def _passes(self, item: Item) -> bool | None:
        """Whether the probe of what a trial starts from clears all baselines; None while a probe is missing."""
        if not item.gate:
            return True
        if any(self.state(probe) != "done" for probe in item.gate):
            return None
        own, *baselines = (self.ledger.records[probe]["linear"] for probe in item.gate)
        return own >= max(baselines) + self.margin

    def _bar(self, item: Item) -> None:
        """Record that a trial is not run, and why, unless it is known."""
        figures = {probe: self.ledger.records[probe]["linear"] for probe in item.gate}
        own, *baselines = item.gate
        best = max(baselines, key=figures.__getitem__)
        text = f"barred: {own} {figures[own]:.3f} is not {self.margin:g} above {best} {figures[best]:.3f}"
        if self.state(item.name) != "barred" or self.ledger.records[item.name].get("text") != text:
            self._record(item, "barred", 0.0, text=text, probes=figures)

    def expected(self, item: Item) -> float:
        """Seconds that an item is expected to take, by what its kind took a step so far; 0 where nothing is known."""
        rates = [
            record.get("seconds", 0.0) / record["steps"]
            for name, record in self.ledger.records.items()
            if record["status"] == "done" and record.get("steps") and name in self.items
            if self.items[name].kind == item.kind
        ]
        return statistics.median(rates) * self.steps[item.name] if rates else 0.0

    def ending(self, chosen: Sequence[str]) -> Ending:
        trials = [name for name, item in self.items.items() if item.kind == "trial"]
        states = {name: self.state(name) for name in {*chosen, *self.wait_for, *trials}}
        return Ending(
            done=sum(states[name] == "done" for name in trials),
            planned=len(trials),
            failed=tuple(name for name in self.wait_for if states[name] == "failed"),
            barred=tuple(name for name in chosen if states[name] == "barred"),
            left=tuple(name for name in chosen if states[name] not in ("done", "failed", "barred")),
        )

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _steps(config: Config, item: Item) -> int:
    """How long an item is."""
    return {"pretrain": config.pretrain.steps, "probe": 1}.get(item.kind, config.finetune.steps)


def _figures(item: Item, ran: Path) -> dict[str, Any]:
    """What the ledger keeps of an item's result; raises `RunError` where that is broken, or a probe judged nothing."""
    if item.kind == "probe":
        probe = ProbeRecord.load(ran)
        linear, nearest = probe.linear.mean, probe.knn.mean
        if linear is None or nearest is None:
            raise RunError("no class was probed: none is both annotated and drawn in the development scans judged")
        return {"linear": linear, "knn": nearest, "text": f"linear probe {linear:.3f}, k-NN {nearest:.3f}"}
    if item.kind == "pretrain":
        return {"text": "pre-trained"}
    mean = DiceRecord.load(ran).mean
    return {"mean": mean, "text": "nothing scored" if mean is None else f"Dice {mean:.3f}"}


def _command(out: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "mixcl_dist.studies.table", str(out), name]
