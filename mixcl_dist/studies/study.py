"""The table of few-label trials: starts × label fractions × subset seeds × searched values."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixcl_dist.cluster import packing
from mixcl_dist.cluster.trials import MEASURED, Outcome, TrialsConfig, run_trials
from mixcl_dist.config import Config, ConfigError, differences, from_dict, replace, to_dict
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.start import like, seen_by, start_name
from mixcl_dist.finetuning.task import Task, budgeted, open_task
from mixcl_dist.networks.architectures import check_size
from mixcl_dist.records import DiceRecord, FinetuneRecord, StartRecord, StudyRecord, TrialRecord
from mixcl_dist.run import held, machine, now, read_config
from mixcl_dist.seen import KnownScans, Shared, check_split, leak, one_patient, shared_scans
from mixcl_dist.studies.ledger import Ledger, digest_of, read
from mixcl_dist.studies.pipeline import Pretrainings, finetuning_part, run_pretraining
from mixcl_dist.studies.rows import LEDGER, PROBE, fold
from mixcl_dist.studies.search import Tpe, check_search, described, early_stopping, heaviest, points
from mixcl_dist.studies.statistics import Interval, is_decided, t_sequence
from mixcl_dist.studies.table.runner import refuse_held_out
from mixcl_dist.studies.trial import CACHE, result_of, run_trial, settings_of

FINAL = ("done", "stopped", "barred")
"""Of trials that are not run again."""
PROBE_STEPS = 5


def run_study(
    config: Config, *, data: Path, starts: Sequence[Path], study: Path, shards: Path | None = None
) -> StudyRecord:
    """Run all trials of the table that are not done yet, and return what `study.json` holds.

    `starts` are pre-training runs that together make the arm "pretrained": each trial begins with the one
    that knows most of its own labelled cases and no others. Arm "scratch" has the same recipe and network.
    Trials are scored on development cases where the budget keeps some back, as the best of a search is a choice.
    With `shards` and no starts, the study pre-trains on those itself, once for all trials that share settings and
    labels, before the first trial; then settings of pre-training may be searched, too.
    A search that learns from its trials, or stops some early, is of one arm: "pretrained" where there are starts.

    Every proposal, report and end of a trial is a line of `ledger.jsonl` in the folder `study`, on disk before the next
    thing is done; called again, after SIGKILL too, the study goes on: what has ended is not repeated, what was running
    goes on from its own checkpoint. `study.json` is written at the begin and the end of a call.
    Raises `RunError`, `ConfigError` or `CaseError`, each one line with the cure, before any trial is run.
    """
    check_search(config, pretrained_too=shards is not None)
    if shards is not None and starts:
        raise ConfigError("--shards: trials start from what is pre-trained on them; give --from none, or no --shards")
    with held(study, "--study"):
        return _run_study(config, data=data, starts=starts, study=study, shards=shards)


def _run_study(config: Config, *, data: Path, starts: Sequence[Path], study: Path, shards: Path | None) -> StudyRecord:
    data, study, starts = data.resolve(), study.resolve(), [start.resolve() for start in starts]
    task = open_task(data, config)
    config = _common_network(config, starts)
    known = KnownScans(study / "trials")
    pretrainings = None
    if shards is not None:
        manifest = Manifest.load(shards.resolve())
        if config.finetune.spacing_mm is None:  # without it, scratch would see other voxels than the other arm
            config = replace(config, {"finetune.spacing_mm": manifest.spacing_mm})
        refuse_held_out(config, task, data, shards.resolve(), manifest, known)
        pretrainings = Pretrainings(config, shards.resolve(), study, manifest)
    if config.study.smallest_difference is not None and not starts and shards is None:
        raise ConfigError("study.smallest_difference: there is one arm, so nothing to compare; give --from a run")
    check_size("finetune.patch_size", config.network, config.finetune.patch_size)
    table = StudyTable.open(study, config, data, starts, plan(config, task, starts, known, pretrainings))
    known.save()  # where the trials look for it
    if config.study.search:
        print(described(config), file=sys.stderr)
    try:
        if pretrainings and table.unfinished:
            _pretrain(pretrainings, table, config)
        if table.unfinished:
            run = functools.partial(run_trial, to_dict(config), data, study)
            places: dict[str, Any] = {"storage": study / "tune", "read": [data, *starts]}
            run_trials(
                run,
                table.proposals(),
                **places,
                config=_packed(run, places, table, config),
                ended=table.ended,
                reported=table.reported,
                early=early_stopping(config),
                earlier=table.curves(),
            )
    finally:
        table.save()
    if table.record.finished:
        shutil.rmtree(study / CACHE, ignore_errors=True)
    return table.record


def _pretrain(pretrainings: Pretrainings, table: StudyTable, config: Config) -> None:
    """Run the pre-trainings that are missing, as trials of their own: those that wait for them hold nothing."""

    def ended(outcome: Outcome) -> None:
        told = "pre-trained" if outcome.error is None else f"pre-training failed: {outcome.error}"
        table.ledger.add(outcome.trial["id"], outcome.trial["id"], "failed" if outcome.error else "done", text=told)
        print(f"{outcome.trial['id']}: {told}", file=sys.stderr, flush=True)

    if missing := pretrainings.unfinished():
        run_trials(
            functools.partial(run_pretraining, pretrainings.study, pretrainings.shards),
            missing,
            storage=pretrainings.study / "tune",
            read=[pretrainings.shards],
            config=config.trials,
            ended=ended,
        )


def _packed(run: Any, places: Mapping[str, Any], table: StudyTable, config: Config) -> TrialsConfig:
    """The settings of trials, with the share of a GPU that a few steps of the heaviest need where it is not given."""
    if config.trials.gpus != MEASURED:
        return config.trials
    probes = table.probes()
    try:
        memory = packing.measure(run, probes, **places, config=config.trials)
    finally:
        for probe in probes:
            shutil.rmtree(table.folder_of(probe), ignore_errors=True)
    table.ledger.add(PROBE, PROBE, "done", gpus=memory.share)
    took, total = (f"{size / 1e9:.1f} GB" for size in (memory.peak + memory.beside, memory.total))
    print(f"a trial takes {took} of a GPU's {total}: {memory.trials} share one", file=sys.stderr, flush=True)
    return dataclasses.replace(config.trials, gpus=memory.share)


def plan(
    config: Config,
    task: Task,
    starts: Sequence[Path],
    known: KnownScans,
    pretrainings: Pretrainings | None = None,
) -> list[dict[str, Any]]:
    """The trials of the table; raises `RunError` where no start may be used for one of them.

    Where points are chosen on the way, the one trial is what all of them have in common.
    """
    shared = {start: shared_scans(seen_by(start), known.of(task.cases)) for start in starts}
    adaptive = config.study.method != "random"
    drawn = [{}] if adaptive else points(config)
    one_arm = adaptive or config.study.stopping != "none"
    trials = []
    for fraction in config.study.fractions:
        for seed in config.study.seeds:
            budget = dataclasses.replace(config.budget, fraction=fraction, scans=None, seed=seed)
            label_cases = budgeted(task, budget)
            check_split(task.cases, label_cases, task.held_out, known)  # what looks alike, each trial says
            distinct = config.budget.distinct_patients
            lawful = _lawful_start(shared, task, label_cases, distinct) if starts else None
            of_scratch = set[str]()
            for number, params in enumerate(drawn):
                start = pretrainings.start(params, fraction, seed) if pretrainings else lawful
                arms: dict[str, Path | None] = {"pretrained": start} if start else {}
                if not (start and one_arm) and (part := repr(finetuning_part(params))) not in of_scratch:
                    arms = {"scratch": None, **arms}
                    of_scratch.add(part)
                suffix = f"-p{number}" if config.study.search and not adaptive else ""
                for arm, path in arms.items():
                    key = {"id": f"{arm}-{fraction:g}-s{seed}{suffix}", "fraction": fraction, "seed": seed}
                    own = params if arm == "pretrained" else finetuning_part(params)
                    trials.append(key | {"start": path and str(path), "params": own})
    return trials


class StudyTable:
    """Which trials there are and how each has ended: what the ledger says, and what is to be run next."""

    def __init__(self, study: Path, config: Config, trials: Sequence[dict[str, Any]], record: StudyRecord) -> None:
        self.record, self._study, self._config, self._begin = record, study, config, time.monotonic()
        self._search = Tpe(config.study.search, config.study.objectives) if config.study.method == "tpe" else None
        self._trials = {trial["id"]: trial for trial in trials}
        self._of_all = digest_of(study, (), _without_machine(to_dict(config)), record.data)
        self._ended, self._over = 0, set[str]()
        lines = read(study / LEDGER)
        newest = {line["item"]: line["digest"] for line in lines if "trial" in line}
        self.rows = fold((_row(trial) for trial in trials if not self._search), lines)
        if strange := [name for name in self.rows if not self._search and name not in self._trials]:
            problem = f"names a trial {strange[0][:60]!r} that this study does not have"
            raise RunError(f"{study / LEDGER}: {problem}; remove its lines, and what is missing is run again")
        self.ledger = Ledger(study / LEDGER)
        for row in list(self.rows.values()):
            if self._search:
                self._trials[row.id] = trials[0] | {"id": row.id, "params": row.params}
            self._take_up(row, newest.get(row.id))

    @classmethod
    def open(
        cls, study: Path, config: Config, data: Path, starts: Sequence[Path], trials: Sequence[dict[str, Any]]
    ) -> StudyTable:
        """Begin a study in the folder, or go on with it; raises `RunError` where it is another one, or a trial in it is
        another trial."""
        adaptive = config.study.method != "random"
        record = StudyRecord(
            name=study.name,
            started=now(),
            config=to_dict(config),
            data=str(data),
            starts=(*(StartRecord(name=start_name(start), path=str(start)) for start in starts), "scratch"),
            fractions=config.study.fractions,
            seeds=config.study.seeds,
            scored="development" if config.budget.development else "validation",
            trials=tuple(_row(trial) for trial in trials if not adaptive),
            machine=machine(),
        )
        if (earlier := StudyRecord.load_if_there(study)) is not None:
            _refuse_another(study, earlier, record)
            record = dataclasses.replace(record, started=earlier.started)
        (study / "trials").mkdir(parents=True, exist_ok=True)
        table = cls(study, config, trials, record)
        table.save()
        return table

    @property
    def planned(self) -> int:
        return self._config.study.samples if self._search else len(self.rows)

    @property
    def unfinished(self) -> int:
        return self.planned - sum(row.status in FINAL for row in self.rows.values())

    def curves(self) -> list[list[dict[str, float]]]:
        """What trials had reported that are not run again."""
        return [_figures(row) for row in self.rows.values() if row.status in FINAL and row.reports]

    def proposals(self) -> Iterator[dict[str, Any]]:
        """The trials that are to be run, each as late as can be: it is noted as running once it is asked for."""
        for row in list(self.rows.values()):
            if row.status not in FINAL:
                if found := self._decided(row.fraction):
                    self._bar(row, found)
                else:
                    yield self._propose(row)
        while self._search and len(self.rows) < self.planned:
            common, number = next(iter(self._trials.values())), len(self.rows)
            name = f"{common['id'].partition('-p')[0]}-p{number}"
            trial = common | {"id": name, "params": self._search.propose(name, number)}
            self._trials[name] = trial
            yield self._propose(_row(trial))

    def probes(self) -> list[dict[str, Any]]:
        """A few steps of the trials that take most memory, each in a new folder of its own."""
        trial = next(iter(self._trials.values()))
        few = {"finetune.steps": PROBE_STEPS}
        found = []
        for number, heavy in enumerate(heaviest(self._config)):
            found.append(trial | {"id": f"{PROBE}-{number}", "params": trial["params"] | heavy | few})
            shutil.rmtree(self.folder_of(found[-1]), ignore_errors=True)
        return found

    def folder_of(self, trial: Mapping[str, Any]) -> Path:
        return self._study / "trials" / trial["id"]

    def reported(self, trial: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        row, step, dice = self.rows[trial["id"]], int(figures["step"]), figures["dice"]
        self.rows[row.id] = dataclasses.replace(row, reports=(*row.reports, (step, dice)))
        self.ledger.add(row.id, self._digest(row.id), "partial", step=step, mean=dice)

    def ended(self, outcome: Outcome) -> None:
        """Note a trial's end, and tell of it in one line."""
        row = self.rows[outcome.trial["id"]]
        if outcome.error is not None:
            log = str(outcome.log.relative_to(self._study)) if outcome.log else None
            row = dataclasses.replace(row, status="failed", error=outcome.error, log=log)
        elif outcome.result is None:
            row = dataclasses.replace(row, status="stopped", mean=row.reports[-1][1])
        else:
            row = dataclasses.replace(row, status="done", error=None, log=None, **outcome.result)
        self._note(row)
        self._ended += 1
        print(f"{row.id}: {_told(row)} ({self._progress()})", file=sys.stderr, flush=True)

    def save(self) -> None:
        """Publish `study.json` as things stand now."""
        rows = tuple(self.rows.values())
        finished = len(rows) == self.planned and all(row.status in (*FINAL, "failed") for row in rows)
        self.record = dataclasses.replace(
            self.record, trials=rows, finished=(self.record.finished or now()) if finished else None
        )
        self.record.save(self._study)

    def _take_up(self, row: TrialRecord, digest: str | None) -> None:
        """A row as an earlier call left it: what has ended by the same settings has, and so has what its folder says
        has."""
        there = (self._study / row.run / DiceRecord.FILE).exists()
        if row.status in FINAL and digest == self._digest(row.id) and (there or row.status != "done"):
            self._over.add(row.id)
            self._tell_search(row)
        elif there:
            self._refuse_another_trial(row)
            self._note(dataclasses.replace(row, status="done", error=None, **result_of(self._study / row.run)))
        else:
            self.rows[row.id] = dataclasses.replace(row, status="pending", mean=None, error=None, log=None)

    def _propose(self, row: TrialRecord) -> dict[str, Any]:
        self.rows[row.id] = row = dataclasses.replace(row, status="running")
        self._write(row, "begun")
        return self._trials[row.id] | {"reported": _figures(row)}

    def _decided(self, fraction: float) -> Interval | None:
        """The paired differences of a fraction's seeds, where they leave nothing open that the user cares about."""
        smallest = self._config.study.smallest_difference
        if smallest is None:
            return None
        dice: dict[str, dict[int, float]] = {"pretrained": {}, "scratch": {}}
        for row in self.rows.values():
            if row.status == "done" and row.fraction == fraction and row.mean is not None:
                dice[row.start][row.seed] = row.mean
        pairs = [seed for seed in self._config.study.seeds if all(seed in of_arm for of_arm in dice.values())]
        found = t_sequence([dice["pretrained"][seed] - dice["scratch"][seed] for seed in pairs])
        return found if is_decided(found, smallest) else None

    def _bar(self, row: TrialRecord, found: Interval) -> None:
        text = f"{found.n} seeds tell: {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}, at every look 95 %)"
        self._note(dataclasses.replace(row, status="barred", error=text))
        print(f"{row.id}: left out; {text}", file=sys.stderr, flush=True)

    def _note(self, row: TrialRecord) -> None:
        self.rows[row.id] = row
        self._over.add(row.id)
        self._write(row, row.status)
        self._tell_search(row)

    def _write(self, row: TrialRecord, status: str) -> None:
        whole = dataclasses.replace(row, reports=())  # which have lines of their own
        self.ledger.add(row.id, self._digest(row.id), status, trial=whole, date=now())

    def _tell_search(self, row: TrialRecord) -> None:
        if self._search:
            figures = {"dice": row.mean, "seconds": row.seconds} if row.status != "failed" else {}
            self._search.tell(row.id, row.params, figures, row.status == "stopped", row.reports)

    def _progress(self) -> str:
        left = self.planned - len(self._over)
        seconds = (time.monotonic() - self._begin) / self._ended
        pace = f"{seconds:.0f} s/trial, {tqdm.format_interval(left * seconds)} left"
        return f"{self.planned - left}/{self.planned} trials, {pace}"

    def _digest(self, name: str) -> str:
        trial = self._trials[name]
        return digest_of(
            self._study, (), self._of_all, *(trial[key] for key in ("fraction", "seed", "start", "params"))
        )

    def _refuse_another_trial(self, row: TrialRecord) -> None:
        """Raise `RunError` where the trial's folder holds another trial."""
        folder, trial = self._study / row.run, self._trials[row.id]
        changed = differences(read_config(folder), settings_of(self._config, trial))
        changed = [key for key in changed if not key.startswith("trials.")]
        changed += ["the start"] if FinetuneRecord.load(folder).start != trial["start"] else []
        if changed:
            raise RunError(
                f"{folder}: holds a trial of other {', '.join(changed)} than this study's; move it elsewhere, and the "
                "same command runs it anew"
            )


def _told(row: TrialRecord) -> str:
    dice = "–" if row.mean is None else f"{row.mean:.3f}"
    if row.status == "stopped":
        return f"stopped at step {row.reports[-1][0]}, Dice {dice}"
    return f"Dice {dice}" if row.status == "done" else f"failed: {row.error}"


def _figures(row: TrialRecord) -> list[dict[str, float]]:
    return [{"step": step, "dice": dice} for step, dice in row.reports]


def _without_machine(config: dict[str, Any]) -> dict[str, Any]:
    """The machine's share for a trial may differ when a study goes on."""
    return config | {"trials": None}


def _row(trial: dict[str, Any]) -> TrialRecord:
    arm = "pretrained" if trial["start"] else "scratch"
    known = {key: trial[key] for key in ("id", "fraction", "seed", "params")}
    return TrialRecord(**known, start=arm, run=f"trials/{trial['id']}")


def _common_network(config: Config, starts: Sequence[Path]) -> Config:
    """`config` with the network of the starts, which then is that of the scratch arm, too."""
    if not starts:
        return config
    first, *others = [like(config, start) for start in starts]
    for start, other in zip(starts[1:], others, strict=True):
        if other != first:
            raise RunError(f"{start}: another network or spacing than {starts[0]}; make two studies of them")
    return first


def _lawful_start(
    shared: Mapping[Path, Sequence[Shared]],
    task: Task,
    label_cases: Sequence[str],
    distinct: Sequence[tuple[str, str]],
) -> Path:
    """The start that knows most of `label_cases` and nothing that this trial must not know."""
    budget = task.labels_of(label_cases)
    rules: dict[str, Any] = {"held_out": task.held_out, "budget": budget, "classes": task.classes, "distinct": distinct}
    problems = {start: leak(scans, **rules) for start, scans in shared.items()}
    lawful = [start for start in shared if problems[start] is None]
    if not lawful:
        start = next(iter(shared))
        raise RunError(f"{start}: {problems[start]}")
    known = {start: one_patient(shared[start], distinct) for start in lawful}
    return max(lawful, key=lambda start: len({one.case for one in known[start] if one.labels & set(task.classes)}))


def _refuse_another(study: Path, earlier: StudyRecord, record: StudyRecord) -> None:
    """Raise `RunError` for a study of another question, with the settings that differ."""
    for key in ("config", "data", "starts", "fractions", "seeds", "scored"):
        value, known = getattr(record, key), getattr(earlier, key)
        if key == "config":
            value, known = _without_machine(value), _without_machine(_with_defaults(known))
            key = f"config ({', '.join(_changed(known, value))})"
        if known != value:
            raise RunError(f"{study}: holds a study with other {key}; give another --study")


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What an older version wrote, with the settings that have come since."""
    try:
        return to_dict(from_dict(config))
    except ConfigError:
        return config


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted settings that differ; one that an older version did not have counts as well."""
    sections = {section: found if isinstance(found := one.get(section), Mapping) else {} for section in other}
    return [
        f"{section}.{name}"
        for section in other
        for name in other[section] or ()
        if sections[section].get(name) != other[section][name]
    ]
