"""The whole run's configuration: one typed tree, read from a YAML file and `--section.key value` overrides.

Every section is a frozen dataclass. The foundations own theirs (`BuildConfig`, `EngineConfig`, `TrialsConfig`), the
application's are in `settings`; this module composes them all. It imports no torch, so that `mixcl --help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mixcl_dist.cluster.checkpoint import CheckpointConfig
from mixcl_dist.cluster.engine import EngineConfig
from mixcl_dist.cluster.trials import TrialsConfig
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.errors import MixclError
from mixcl_dist.settings import (
    BudgetConfig,
    DataConfig,
    FinetuneConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    RowsConfig,
    StudyConfig,
    TableConfig,
    ViewsConfig,
)

PRETRAINING = (
    "data", "network", "views", "rows", "objective", "optimizer", "budget", "engine", "checkpoint", "pretrain",
)  # fmt: skip
"""Sections that a pre-training reads."""


class ConfigError(MixclError):
    """A configuration file, key or value that cannot be used; the message is one line with the cure."""


@dataclass(frozen=True)
class Config:
    """The resolved configuration of one run."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    # Sections without a `__pydantic_config__` of their own take this one.

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

    def __post_init__(self) -> None:
        if self.objective.reconstruction and not self.objective.masked_weight and self.views.mask_fraction == 1:
            raise ValueError(
                "objective.masked_weight is 0 and views.mask_fraction is 1, so no voxel is restored; change one of them"
            )


def load(*files: Path, recipe: str | None = None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Resolve defaults, then the recipe, then each file, then the overrides; the later wins.

    Raises `ConfigError` for an unknown recipe, key or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    for _, layer in layers(*files, recipe=recipe, overrides=overrides):
        _supersede(tree, layer)
        _merge(tree, layer)
    return from_dict(tree)


def layers(
    *files: Path, recipe: str | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """What `load` joins, in order: where each comes from, and its settings as nested dictionaries."""
    found = [(f"recipe {recipe}", _read_yaml(recipe_path(recipe)))] if recipe is not None else []
    found += [(str(file), _read_yaml(file)) for file in files]
    given: dict[str, Any] = {}
    for key, value in overrides:
        _merge(given, _nested(key, _parse_value(key, value)))
    return [*found, ("command line", given)]


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a `Config` from nested dictionaries; raises `ConfigError` with the nearest valid name."""
    _refuse_unknown(Config, tree, prefix="")
    try:
        return _adapter().validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if isinstance(first["input"], Mapping) else f" = {first['input']!r}"  # a whole section is no value
        problem = re.sub("^Value error, |^(Tuple|List) | after validation", "", first["msg"])  # a user's words
        raise ConfigError(f"{key}{value}: {problem}" if key else problem) from None


def schema() -> dict[str, Any]:
    """JSON schema of all settings: types, bounds and, as descriptions, their docstrings."""
    return _adapter().json_schema()


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
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}; mend it there") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not sections; see `mixcl config show`")
    return tree or {}


def _parse_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        cure = "close what it opens, or put it in quotes"
        raise ConfigError(f"--{key} {text}: not a YAML value; {cure}") from None
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


def _supersede(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """How many scans are labelled may be given in two ways: a layer that gives one lifts the other of those before."""
    new, old = (part.get("budget") for part in (layer, tree))
    if isinstance(new, Mapping) and isinstance(old, dict):
        for key, other in (("scans", "fraction"), ("fraction", "scans")):
            if new.get(key) is not None and other not in new:
                old.pop(other, None)


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and key != "search":
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _refuse_unknown(section: type, tree: Any, prefix: str) -> None:
    if not isinstance(tree, Mapping):
        name = prefix.rstrip(".")
        cure = f"see `mixcl config show {name.partition('.')[0]}`"
        raise ConfigError(f"{name}: a section with keys is needed, not {tree!r}; {cure}")
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
