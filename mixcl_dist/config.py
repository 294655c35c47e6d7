"""The whole run's configuration: one typed tree, read from a YAML file and `--section.key value` overrides.

Every section is a frozen dataclass. The foundations own theirs (`BuildConfig`, `EngineConfig`, `TrialsConfig`);
this module holds the application's and composes them all. It imports no torch, so that `mixcl --help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mixcl_dist.cluster.checkpoint import CheckpointConfig
from mixcl_dist.cluster.engine import EngineConfig
from mixcl_dist.cluster.trials import TrialsConfig
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.storage.store import CacheConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Size3 = tuple[Count, Count, Count]


class ConfigError(ValueError):
    """A configuration file, key or value that cannot be used; the message is one line with the cure."""


@dataclass(frozen=True)
class DataConfig:
    """How patches are streamed from shards."""

    workers: Annotated[int, Field(ge=0)] = 1
    """Processes of each rank that read and decode; the order of samples does not depend on it."""
    labelled_fraction: Fraction | None = None
    """Share of every batch that shows cases of the label budget, held exactly; None draws all cases alike."""
    class_aware: bool = True
    """Within that share every annotated class is shown equally often."""
    upsampling: dict[str, Positive] = field(default_factory=dict)
    """Data set → how often its patches come in an epoch, e.g. {rare: 4}; 1 where it is not named."""
    max_bad_fraction: Fraction = 0.001
    """Share of samples that may turn out unreadable, and be replaced, before the run stops."""
    cache: CacheConfig | None = None
    """Where to keep what was read from a remote store, e.g. {folder: /scratch/mixcl, max_bytes: 200000000000}."""


@dataclass(frozen=True)
class NetworkConfig:
    """The encoder-decoder that is pre-trained and fine-tuned."""

    architecture: Literal["dynunet", "residual_dynunet"] = "dynunet"
    filters: Annotated[tuple[Count, ...], Field(min_length=3)] = (16, 32, 64, 128)
    """Channels of each resolution level; each level halves the resolution of the one before."""
    voxel_dim: Count = 64
    """Width D of a voxel row's embedding."""
    crop_dim: Count = 64
    """Width of a crop row's embedding."""
    window_hu: tuple[float, float] = (-1000.0, 1000.0)
    """HU that the network's input range [-1, 1] stands for; values outside are clipped."""


@dataclass(frozen=True)
class ViewsConfig:
    """Two overlapping degraded views of every patch, made on the device."""

    size: Size3 = (32, 32, 32)
    """Voxels of a view; a patch on disk is at least as large."""
    min_overlap: Fraction = 0.4
    """Smallest share of a view's voxels that also lie in its partner (before rotation and scaling)."""
    rotation_deg: NonNegative = 10.0
    scale: tuple[Positive, Positive] = (0.9, 1.1)
    mask_fraction: Fraction = 0.3
    mask_block: Count = 8
    """Edge of a masked cube in voxels."""
    noise_hu: NonNegative = 30.0
    blur_sigma: NonNegative = 1.0
    """Largest blur in voxels."""
    low_resolution: Annotated[float, Field(ge=1)] = 2.0
    """Largest factor by which resolution is lowered."""
    shift_hu: NonNegative = 50.0


@dataclass(frozen=True)
class RowsConfig:
    """Which voxels become rows of the contrastive loss."""

    per_view_pair: Count = 256
    border_fraction: Fraction = 0.5
    """Share of points drawn near organ borders, where labels exist."""
    min_spacing: Count = 2
    """Smallest distance between two points of a patch along some axis, in voxels; at most one voxel in
    (2 · min_spacing − 1)³ can then be a point."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and temperatures of the three consistencies; 0 switches a term off."""

    voxel_identity: NonNegative = 1.0
    voxel_label: NonNegative = 1.0
    crop_identity: NonNegative = 0.25
    reconstruction: NonNegative = 1.0
    voxel_temperature: Positive = 0.1
    crop_temperature: Positive = 0.2
    reconstruction_beta: Positive = 0.05
    """Error at which smooth-L1 turns from squares to absolute values, in the network's input range: 0.05 is 50 HU of a
    window of 2,000. At 1 the term's gradient on the backbone was a thirtieth of the others'."""
    masked_weight: NonNegative = 4.0
    """Weight of a masked voxel in the reconstruction, where an unmasked one has 1."""

    def __post_init__(self) -> None:
        if not (self.voxel_identity or self.voxel_label or self.crop_identity or self.reconstruction):
            raise ValueError("every weight is 0, so nothing would be learned; give one term a weight")

    def single_terms(self) -> dict[str, ObjectiveConfig]:
        """Each term that has a weight, and this objective with that term alone."""
        terms = ("voxel_identity", "voxel_label", "crop_identity", "reconstruction")
        weights = {term: weight for term in terms if (weight := getattr(self, term))}
        off = dict.fromkeys(terms, 0.0)
        return {term: dataclasses.replace(self, **(off | {term: weight})) for term, weight in weights.items()}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    warmup_fraction: Fraction = 0.05
    final_fraction: Fraction = 0.01
    """Learning rate at the end, as a share of the highest."""


@dataclass(frozen=True)
class BudgetConfig:
    """Whose pixel labels may be used: the first training cases, by share or number, of an order drawn from `seed`."""

    fraction: Fraction = 0.0
    seed: int = 0
    full_datasets: tuple[str, ...] = ()
    """Data sets all of whose training labels may be used, because another one is to be fine-tuned on."""
    scans: Count | None = None
    """Number of labelled scans of a data set, instead of `fraction`."""
    development: tuple[str, ...] = ()
    """Training cases kept back, neither trained on nor in any budget: every choice is made by their scores."""
    classes: tuple[str, ...] | None = None
    """Classes whose labels may be read; voxels of others look as if nobody had annotated them. None: all."""

    def __post_init__(self) -> None:
        if self.fraction and self.scans is not None:
            raise ValueError(f"fraction {self.fraction:g} and scans {self.scans} are both given; set one of them")


@dataclass(frozen=True)
class PretrainConfig:
    steps: Count = 1000
    batch_size: Count = 8
    """Patches in a global batch, over all ranks and accumulation steps."""
    seed: int = 0
    log_every: Count = 10
    sample_every: Count = 200
    """Steps between the pictures kept for the report."""
    probe_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two probes of the features on the development scans, one of them at the end; 0: never."""
    gradient_norms_every: Annotated[int, Field(ge=0)] = 50
    """Steps between two measurements of each term's gradient norm on the backbone, and of how far the voxel rows are
    spread; such a step takes as long as four. 0 measures never."""


@dataclass(frozen=True)
class FinetuneConfig:
    steps: Count = 300
    batch_size: Count = 2
    patch_size: Size3 = (48, 48, 48)
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """Spacing to resample to; None takes the spacing of the pre-trained network's shards, or keeps the case's own."""
    learning_rate: Positive = 2e-3
    weight_decay: NonNegative = 1e-4
    warmup_fraction: Fraction = 0.1
    head_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which only the classifier learns, so that its random start does not spoil the backbone."""
    level_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each level of the backbone learns at this factor of the learning rate of the level nearer to the classifier."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of the exponential moving average of the weights that is scored and kept; 0 keeps the last weights."""
    curve_every: Count = 250
    """Steps between points of the curve of Dice on the first `curve_scans` development scans."""
    curve_scans: Count = 6
    classes: tuple[str, ...] | None = None
    """Classes to learn and score, of those in the budget; None: all."""
    sliding_overlap: Fraction = 0.25
    surface_tolerance_mm: NonNegative = 3.0
    """Distance up to which two surfaces count as one in the surface Dice."""
    log_every: Count = 10


@dataclass(frozen=True)
class StudyConfig:
    """The table of trials: starts × label fractions × subset seeds × searched values."""

    fractions: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.05, 0.15)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    search: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Searched values by configuration key, e.g. {"finetune.learning_rate": {"loguniform": [1e-4, 1e-2]}}."""
    samples: Count = 1
    """Draws from the search space for each trial of the table."""


@dataclass(frozen=True)
class StageConfig:
    """A pre-training that arms of a few-label table start from."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    start: str | None = None
    """Stage that this one goes on from; None begins with random weights."""
    labels: Literal["none", "budget", "all"] = "none"
    """Whose pixel labels it reads: nobody's, so that it is run once; those of a trial's scans, so that it is run for
    each (scans, seed); or those of a fold's known organs in all scans, so that it is run for each fold."""
    supervised: bool = False
    """Trains a segmentation of those labels instead of the objective."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings by dotted key that differ from the recipe's, e.g. {objective.voxel_label: 0}."""


@dataclass(frozen=True)
class ArmConfig:
    """What a table compares: how its trials start. Fine-tuning is the same for every arm."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    stage: str | None = None
    """Pre-training that the trials start from; None starts from scratch."""
    voxels_of: str | None = None
    """Stage whose voxels, with those of the stages before it, are added to the trials' own: they take as many steps
    more as show the network equally many voxels."""


@dataclass(frozen=True)
class FoldConfig:
    """Organs that are labelled everywhere, and organs to be learnt from few scans."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    known: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True)
class OtherOrgansConfig:
    """The second block of a table: pre-train with the labels of known organs in all scans, fine-tune on new ones."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    folds: dict[str, FoldConfig] = field(default_factory=dict)
    scans: tuple[Count, ...] = (1, 2)
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    compared: tuple[tuple[str, str], ...] = ()
    """Pairs [arm, reference] that are compared, beside every arm with scratch."""


@dataclass(frozen=True)
class TableConfig:
    """The few-label table: arms × labelled scans × subset seeds, and the same for other organs."""

    scans: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 9)
    """Numbers of labelled scans."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = tuple(range(10))
    """Subsets of scans, fixed beforehand."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    compared: tuple[tuple[str, str], ...] = ()
    """Pairs [arm, reference] that are compared, beside every arm with scratch."""
    other_organs: OtherOrgansConfig = field(default_factory=OtherOrgansConfig)
    first_scans: tuple[Count, ...] = (1, 2)
    first_arms: tuple[str, ...] = ("scratch", "mixcl")
    """The cells that tell most, which are run before all others."""
    baselines: tuple[str, ...] = ("random", "reconstruction")
    """Stages whose probe every other pre-training has to beat before trials start from it, random weights among them;
    none lifts the gate."""
    margin: float = 0.02
    """Dice of the linear probe by which it has to be beaten."""
    final: bool = True
    """Score the trials on validation scans, after which nothing is chosen; false scores them on the development scans,
    for choosing between recipes."""
    resamples: Count = 10_000
    """Bootstrap resamples, of seeds and of cases, for the standard error of a difference."""


@dataclass(frozen=True)
class Config:
    """The resolved configuration of one run."""

    build: BuildConfig = field(default_factory=BuildConfig)
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    table: TableConfig = field(default_factory=TableConfig)
    trials: TrialsConfig = field(default_factory=TrialsConfig)


def load(*files: Path, recipe: str | None = None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Resolve defaults, then the recipe, then each file, then the overrides; the later wins.

    Raises `ConfigError` for an unknown recipe, key or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    if recipe is not None:
        _merge(tree, _read_yaml(recipe_path(recipe)))
    for file in files:
        _merge(tree, _read_yaml(file))
    for key, value in overrides:
        _merge(tree, _nested(key, _parse_value(key, value)))
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a `Config` from nested dictionaries; raises `ConfigError` with the nearest valid name."""
    _refuse_unknown(Config, tree, prefix="")
    try:
        return _adapter().validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if isinstance(first["input"], Mapping) else f" = {first['input']!r}"  # a whole section is no value
        raise ConfigError(f"{key}{value}: {first['msg'].removeprefix('Value error, ')}") from None


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    """Made once, as that takes longer than all else here: a table has hundreds of configurations."""
    return TypeAdapter(Config)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, as `config.yaml` in a run's folder holds it."""
    return _adapter().dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def replace(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with dotted keys set, e.g. `{"finetune.learning_rate": 1e-3}`; raises `ConfigError`."""
    tree = to_dict(config)
    for key, value in overrides.items():
        _merge(tree, _nested(key, value))
    return from_dict(tree)


def differences(one: Config, other: Config) -> list[str]:
    """Dotted keys whose values differ."""
    trees = to_dict(one), to_dict(other)
    return [
        f"{section}.{key}" for section in trees[0] for key in trees[0][section]
        if trees[0][section][key] != trees[1][section][key]
    ]  # fmt: skip


def recipe_names() -> list[str]:
    folder = resources.files("mixcl_dist.recipes")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    if name not in recipe_names():
        raise ConfigError(f"recipe {name!r} does not exist{_nearest(name, recipe_names())}")
    return Path(str(resources.files("mixcl_dist.recipes") / f"{name}.yaml"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not sections; see `mixcl config show`")
    return tree or {}


def _parse_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--{key} {text}: not a YAML value") from None
    if isinstance(value, str) and "," in value:
        return [yaml.safe_load(part) for part in value.split(",")]
    section, _, name = key.partition(".")
    default = getattr(getattr(Config(), section, None), name, None)
    a_list = isinstance(default, tuple) or name == "classes"  # the one kind of list that is None by default
    return [value] if a_list and value is not None and not isinstance(value, list) else value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and key != "search":
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _refuse_unknown(section: type, tree: Any, prefix: str) -> None:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}: a section with keys is needed, not {tree!r}")
    adapter_fields = {f.name: f for f in dataclasses.fields(section)}
    for key, value in tree.items():
        if key not in adapter_fields:
            raise ConfigError(f"unknown key {prefix}{key}{_nearest(f'{prefix}{key}', _all_keys())}")
        kind = adapter_fields[key].default_factory
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            _refuse_unknown(kind, value, f"{prefix}{key}.")


def _all_keys() -> list[str]:
    keys = []
    for section in dataclasses.fields(Config):
        keys.append(section.name)
        keys += [f"{section.name}.{f.name}" for f in dataclasses.fields(section.default_factory)]  # type: ignore[arg-type]
    return keys


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(names)}"
