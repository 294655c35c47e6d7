"""The JSON files of runs, studies and tables: what each holds, its one writer and its one reader.

A reader takes nothing on trust (see `jsonfiles`). A field with a default may be missing, as older versions did not
write it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field

from mixcl_dist.cluster.trials import TrialsConfig
from mixcl_dist.config import from_dict
from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import FORMAT, STRICT, plain, read_json, read_lines, shown, write_json
from mixcl_dist.settings import Architecture, FinetuneConfig, NetworkConfig, StudyConfig, TableConfig

OF_NETWORK = ("architecture", "filters", "kernel_spacing_mm", "window_hu")
"""Settings of a network that its weights go with."""
UNTOLD = 1e100
"""Of no arithmetic here, and more than an axis can be drawn for."""
RUN, METRICS, CURVE = "run.json", "metrics.jsonl", "curve.jsonl"
ANEW = "move the folder away and make it again"
"""What helps where a run or an export is damaged, whoever made it; what is whole in it is not lost."""


def _inside(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\0" in path:
        raise ValueError("leads out of this folder")
    return path


def _of_a_study(config: dict[str, Any]) -> dict[str, Any]:
    """Settings, of this version or an earlier one, of which those are used that this version has, too."""
    for section, settings in config.items():
        if not (settings is None or isinstance(settings, dict)):
            raise ValueError(f"{section} is no section of settings")
    read = {"study": StudyConfig, "finetune": FinetuneConfig, "trials": TrialsConfig}
    names = {section: {one.name for one in fields(kind)} for section, kind in read.items()}
    from_dict({s: {k: v for k, v in (config.get(s) or {}).items() if k in names[s]} for s in names})
    return config


Inside = Annotated[str, AfterValidator(_inside)]
"""A path relative to the record's folder, and in it."""
Dice = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seed = Annotated[int, Field(gt=-(2**53), lt=2**53)]
Spacing = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
"""mm."""
Size = tuple[Count, Count, Count]
"""Voxels."""
Labels = dict[str, Dice | None]
"""Dice by class; None where it is not scored."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON file in a folder."""

    __pydantic_config__ = STRICT

    FILE: ClassVar[str]
    CURE: ClassVar[str]
    MISSING: ClassVar[str] = "give the folder of a finished run"
    """What to do where there is no such file."""

    format: Count = FORMAT

    def save(self, folder: Path) -> None:
        """Publish the file whole in a folder; raises `RunError` where there is no room for it."""
        self.write(folder / self.FILE)

    def write(self, file: Path) -> None:
        write_json(file, self.content())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises `RunError`, in one line."""
        return cls.read(folder / cls.FILE)

    @classmethod
    def load_if_there(cls, folder: Path) -> Self | None:
        return cls.load(folder) if (folder / cls.FILE).is_file() else None

    @classmethod
    def read(cls, file: Path) -> Self:
        return read_json(file, cls._kind_of, cls.CURE, cls.MISSING)

    @classmethod
    def _kind_of(cls, content: Mapping[str, Any]) -> type[Self]:
        """The class to read a file's content as; raises `ValueError` where it is of another kind."""
        return cls

    def content(self) -> dict[str, Any]:
        """As plain JSON values."""
        return plain(self)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a figure was measured on."""

    cpu: str = "?"
    cores: Count = 0
    gpu: str | None = None
    memory_gb: Length = 0.0


@dataclass(frozen=True, kw_only=True)
class ShardsRecord:
    """The shards of a pre-training."""

    manifest_digest: str
    cases: Count
    patches: Count
    training_patches: Count | None = None
    classes: tuple[str, ...]
    spacing_mm: Spacing | None
    patch_size: Size


@dataclass(frozen=True, kw_only=True)
class Range:
    """What is expected, and between what it is said to lie."""

    expected: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True, kw_only=True)
class RunPlan(Record):
    """What `mixcl plan` predicts of a pre-training, from what it measured; a run that is given one records it."""

    FILE = "pretraining-plan.json"
    CURE = "plan again"
    MISSING = "write it first: mixcl plan … --out PLAN.json"

    kind: Literal["plan of a run"] = "plan of a run"
    gpus: Count
    """Processes where there are no GPUs."""
    nodes: Count
    hours: Length
    config: dict[str, Any]
    """Settings that it holds for."""
    shards: str
    """Digest of their manifest."""
    step_s: Range
    patches_per_s: Range
    """Of all GPUs together."""
    steps: Range
    """In `hours`."""
    samples: Range
    epochs: Range
    gpu_hours: Length
    asked_hours: Range
    """That `pretrain.steps` of `config` take."""
    parts_s: dict[str, Length]
    """Of a step, by what it does; reading is beside the others."""
    limit: str
    """What a step waits for or takes most of its time for, and what lifts that."""
    disk_bytes: Length
    """Of checkpoints and the network that a run leaves."""
    shards_bytes: Length
    read_bytes_per_s: Length
    """From the store of the shards, all GPUs together."""
    exchange_bytes_per_s: Length
    """That a GPU gets from the others, on the average of a step."""
    memory_bytes: Length | None
    """Of a GPU, or of a process where there is none."""
    memory_there_bytes: Length | None
    measured: tuple[str, ...]
    assumed: tuple[str, ...]
    made: str
    """When: UTC, ISO 8601."""
    machine: Machine


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """`run.json`: who may read which labels, versions, machine, time."""

    FILE = RUN
    CURE = ANEW

    kind: Literal["pretrain", "finetune"]
    name: str
    started: str | None = None
    """UTC, ISO 8601."""
    finished: str | None = None
    seconds: Length = 0.0
    peak_memory_mb: Count | None = None
    warnings: dict[str, str] = field(default_factory=dict)
    trackers: dict[str, str] = field(default_factory=dict)
    """Tracker → its id of the run."""
    mixcl_version: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    arithmetic: str = ""
    start: str | None = None
    """Folder of the run that it began from; None: random weights."""
    training_cases: tuple[str, ...] = ()
    """Whose images were learnt from, by this run and those it started from."""
    label_cases: tuple[str, ...]
    """Whose labels were read."""

    @property
    def how_to_finish(self) -> str:
        resume = {"pretrain": " with --resume latest", "finetune": ""}[self.kind]
        return f"give its mixcl {self.kind} command again{resume}"

    @classmethod
    def _kind_of(cls, content: Mapping[str, Any]) -> type[Self]:
        kinds: dict[Any, type[RunRecord]] = {"pretrain": PretrainRecord, "finetune": FinetuneRecord}
        known = kinds.get(content.get("kind")) if isinstance(content.get("kind"), str) else None
        if known is None or not issubclass(known, cls):
            wanted = " or ".join(kind for kind, record in kinds.items() if issubclass(record, cls))
            raise ValueError(f"kind is {shown(content.get('kind'))}, not {wanted}")
        return known


@dataclass(frozen=True, kw_only=True)
class PretrainRecord(RunRecord):
    kind: Literal["pretrain"] = "pretrain"
    shards: ShardsRecord | None = None
    withheld_cases: tuple[str, ...] = ()
    world_size: Count = 1
    datasets: dict[str, Count] = field(default_factory=dict)
    """Data set → cases of it that were learnt from."""
    terms: tuple[str, ...] = ()
    """Of the objective, those that something was learnt from."""
    budget: dict[str, Any] = field(default_factory=dict)
    parameters: Count = 0
    plan: RunPlan | None = None
    """What `mixcl plan` had said of it."""


@dataclass(frozen=True, kw_only=True)
class FinetuneRecord(RunRecord):
    kind: Literal["finetune"] = "finetune"
    start_name: str = ""
    fraction: Dice | None = None
    """Share of the labelled cases in the budget, where `scans` gives no number."""
    scans: Count | None = None
    seed: Seed | None = None
    validation_cases: tuple[str, ...] = ()
    scored: Literal["validation", "development"] = "validation"
    scored_cases: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    unshown_classes: tuple[str, ...] = ()
    """Those that no labelled case shows."""
    start_saw: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Cases of this data set that the start has seen, under whatever name → classes whose labels it read."""
    distinct_patients: tuple[tuple[str, str, float], ...] = ()
    """Case, scan of the start that looks like it, and their distance, where a person found two patients."""
    spacing_mm: Spacing | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkRecord(Record):
    """`network.json`: what the weights beside it are of."""

    FILE = "network.json"
    CURE = ANEW

    architecture: Architecture
    filters: Annotated[tuple[Annotated[int, Field(ge=1, le=2**16)], ...], Field(min_length=3, max_length=16)]
    window_hu: tuple[float, float]
    spacing_mm: Spacing | None
    """At which it was trained; None: each case at its own."""
    classes: tuple[str, ...]
    kernel_spacing_mm: Spacing | None = None
    """Which its kernels and strides are made for."""
    patch_size: Size | None = None
    sliding_overlap: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the windows that it was scored with, the share of an edge."""
    digests: dict[str, str] = field(default_factory=dict)
    """File of weights → SHA-256."""

    def __post_init__(self) -> None:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"window_hu {self.window_hu} does not rise")

    @classmethod
    def of(cls, network: NetworkConfig, weights: Mapping[str, bytes], **more: Any) -> Self:
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in weights.items()}
        known = {key: getattr(network, key) for key in OF_NETWORK}
        return cls(**known, **more, digests=digests)

    def check(self, file: Path) -> None:
        """Raise `RunError` where a file of weights is not that which was written with this record."""
        expected = self.digests.get(file.name)
        if expected is None:
            return
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                raise RunError(f"{file}: content differs from its digest in {self.FILE}; copy it again, or {self.CURE}")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One score of every case and class."""

    classes: tuple[str, ...] = ()
    cases: dict[str, dict[str, Length | None]] = field(default_factory=dict)
    """Case → class → score; None where the class is not annotated, is doubtful or has no voxel in the case."""
    class_mean: dict[str, Length | None]
    mean: Length | None = None


@dataclass(frozen=True, kw_only=True)
class DiceRecord(Record):
    """`dice.json`, written last: a folder that holds it holds a finished trial."""

    FILE = "dice.json"
    CURE = "remove it and fine-tune again"

    classes: tuple[str, ...]
    cases: dict[str, Labels]
    class_mean: Labels
    mean: Dice | None
    """Over the classes that some labelled case shows; None where none of them was scored."""
    scored: Literal["validation", "development"] = "validation"
    hd95_mm: Scores | None = None
    surface_dice: Scores | None = None

    def __post_init__(self) -> None:
        if unknown := sorted({name for of in (self.class_mean, *self.cases.values()) for name in of} - {*self.classes}):
            raise ValueError(f"{unknown[0]} is scored, but is not among classes")


@dataclass(frozen=True, kw_only=True)
class CasePrediction(Record):
    """`cases/NAME.json` of a prediction, written after all else of its case, so that one that has it is done."""

    CURE = "remove it and predict again"

    case: str
    file: str
    """The scan, or its first file."""
    stamp: str
    """Of the scan's files as they were read."""
    seconds: Length
    outputs: dict[Inside, Count]
    """File that was written → its size in bytes."""
    volume_ml: dict[str, Length]
    """Class → what was found of it."""
    dice: Labels = field(default_factory=dict)
    hd95_mm: dict[str, Length | None] = field(default_factory=dict)
    surface_dice: Labels = field(default_factory=dict)
    unscored: str = ""
    """Why it has labels and was not scored."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A case that could not be segmented or scored, or a file that could be a scan and was not used."""

    case: str = ""
    where: str
    """The file."""
    problem: str
    """What is wrong with it, and the cure."""


@dataclass(frozen=True, kw_only=True)
class PredictionRecord(Record):
    """`prediction.json`: a network applied to the scans of a source."""

    FILE = "prediction.json"
    CURE = "predict again with another --out"

    kind: Literal["prediction"] = "prediction"
    model: str
    """Name of the run or export."""
    model_digest: str
    """SHA-256 of its weights."""
    classes: tuple[str, ...]
    """Value k > 0 of a label is `classes[k - 1]`."""
    window_hu: tuple[float, float]
    spacing_mm: Spacing | None
    patch_size: Size
    sliding_overlap: Dice
    mirror: bool = False
    probabilities: bool = False
    data: str
    surface_tolerance_mm: Length
    mixcl_version: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    arithmetic: str = ""
    started: str | None = None
    finished: str | None = None
    seconds: Length = 0.0
    cases: tuple[str, ...] = ()
    """All that were asked for."""
    refused: tuple[Refused, ...] = ()
    dice: Scores | None = None
    hd95_mm: Scores | None = None
    surface_dice: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A line of `curve.jsonl`: Dice on development scans while a trial learns."""

    step: Count
    seconds: Length = 0.0
    mean: Dice | None
    dice: Labels = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A row of a study's table."""

    id: str
    start: str
    """Arm: "scratch" or "pretrained"."""
    fraction: Dice
    seed: Seed
    params: dict[str, Any] = field(default_factory=dict)
    run: Inside
    status: Literal["pending", "running", "done", "stopped", "barred", "failed"] = "pending"
    """"stopped" early by others' Dice; "barred" since what it would tell is decided."""
    mean: Dice | None = None
    """Of a stopped trial the last that it reported, of the curve."""
    class_mean: Labels | None = None
    seconds: Length | None = None
    error: str | None = None
    log: Inside | None = None
    """File with a failed trial's whole error."""
    reports: tuple[tuple[Count, Dice], ...] = ()
    """Step and mean Dice of the curve's points, as they were reported."""


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class StudyRecord(Record):
    """`study.json`: which trials there are and how each ended, as of the last call's end; `ledger.jsonl` beside it has
    what came since (see `studies.rows`)."""

    FILE = "study.json"
    CURE = "remove it and run mixcl tune again, which keeps finished trials"
    MISSING = "give the --study of a mixcl tune that has begun"

    kind: Literal["study"] = "study"
    name: str
    started: str | None = None
    finished: str | None = None
    config: Annotated[dict[str, Any], AfterValidator(_of_a_study)] = field(default_factory=dict)
    data: str = ""
    starts: tuple[StartRecord | Literal["scratch"], ...]
    fractions: tuple[Dice, ...] = ()
    seeds: tuple[Seed, ...] = ()
    scored: Literal["validation", "development"] = "validation"
    trials: tuple[TrialRecord, ...]
    machine: Machine = field(default_factory=Machine)


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    mean: Dice | None
    dice: Labels
    scans: tuple[Dice | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProbeScans:
    fitted: Count
    judged: Count


@dataclass(frozen=True, kw_only=True)
class ProbeRecord(Record):
    """`probe.json`: Dice of classifiers of frozen features."""

    FILE = "probe.json"
    CURE = "remove it and probe again"

    linear: ProbeScores
    knn: ProbeScores
    scans: ProbeScans
    cases: tuple[str, ...] = ()
    """The development scans that it was fitted to and judged on, by turns."""
    seconds: Length | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedItem:
    """Something that a table runs (see `studies.table.plan.Item`)."""

    name: Inside
    kind: Literal["pretrain", "supervised", "probe", "trial"]
    settings: dict[str, Any]
    start: str | None
    gate: tuple[str, ...]
    arm: str
    scans: Count
    seed: Seed
    fold: str
    digest: str | None = None
    """Of all that its figures depend on."""


@dataclass(frozen=True, kw_only=True)
class PlanRecord(Record):
    """`plan.json`: the question of a few-label table and all that is run to answer it."""

    FILE = "plan.json"
    CURE = "give the same mixcl table command with another --out"

    kind: Literal["table"] = "table"
    name: str
    started: str
    data: str
    shards: str
    digest: str
    table: TableConfig
    items: tuple[PlannedItem, ...]

    def __post_init__(self) -> None:
        known: set[str] = set()
        others = self.table.other_organs
        arms = {"": self.table.arms} | {fold: others.arms for fold in others.folds}
        for item in self.items:
            for need in (item.start, *item.gate):
                if need is not None and need not in known:
                    raise ValueError(f"item {item.name} needs {need}, which does not come before it")
            if item.kind == "trial" and item.arm not in arms.get(item.fold, ()):
                raise ValueError(f"item {item.name} is of arm {item.arm}, which the table does not have")
            known.add(item.name)


def told(record: Any) -> dict[str, Any]:
    """A record, or a part of one, as plain JSON values, without what it says nothing of."""
    kind = {"kind": record.kind} if isinstance(record, RunRecord) else {}
    return kind | plain(record, exclude_defaults=True)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The logged steps of `metrics.jsonl`, each with its finite numbers; raises `RunError`."""
    rows = read_lines(file, dict[str, float | None], f"remove the line, or {ANEW}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(step := row.get("step"), int | float) or step != int(step) or not 0 <= step < 2**53:
            raise RunError(f"{file}: line {number}: step is {shown(step)}; remove the line, or {ANEW}")
    return [
        {key: int(n) if key == "step" else n for key, n in row.items() if n is not None and abs(n) < UNTOLD}
        for row in rows
    ]


def read_curve(file: Path) -> list[CurvePoint]:
    """Raises `RunError`."""
    return read_lines(file, CurvePoint, f"remove the line, or {ANEW}")
