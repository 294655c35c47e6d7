"""What is searched, and how the next point is chosen: at random, on a grid, or by Optuna from what others came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixcl_dist.cluster.trials import EarlyStopping, SearchError, draw
from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.networks.architectures import check_size

SEED = 0
RANGES, SETS = ("uniform", "loguniform", "randint"), ("grid", "choice")
WHEN = "when"
READ = ("finetune.", "network.")
"""Settings that a trial reads."""
SEARCHED = ("pretrain.", "objective.", "optimizer.", "views.", "rows.")
"""Settings that pre-training alone reads."""
WEIGHTY = ("network.", "finetune.patch_size", "finetune.batch_size", "finetune.spacing_mm", "finetune.classes")
"""Settings that the memory of a trial depends on."""
Space = Mapping[str, Mapping[str, Any]]


def check_search(config: Config, pretrained_too: bool = False) -> None:
    """Raise `ConfigError` for a search that cannot be run as it is asked for, by the settings alone.

    With `pretrained_too`, settings of pre-training may be searched.
    """
    study = config.study
    cells = len(study.fractions) * len(study.seeds)
    if study.search and not config.budget.development:
        raise ConfigError(
            "study.search: the best draw would be chosen on validation scans; name training scans to choose on in "
            "budget.development, or leave the search out"
        )
    adaptive = [f"study.{key} {value}" for key, value in _adaptive(config).items()]
    if adaptive and not study.search:
        raise ConfigError(f"{adaptive[0]}: there is no study.search; give one, or leave it out")
    if adaptive and cells > 1:
        raise ConfigError(
            f"{adaptive[0]}: compares points of one cell, but there are {cells}; give one of study.fractions and one "
            "of study.seeds"
        )
    if study.stopping != "none":
        _check_stopping(config)
    if study.smallest_difference is not None and study.search:
        raise ConfigError("study.smallest_difference: compares arms, not draws; leave it or study.search out")
    for key, description in study.search.items():
        _check_values(config, key, description, READ if not pretrained_too else (*READ, *SEARCHED))
    if study.method == "tpe" and any(key.startswith(SEARCHED) for key in study.search):
        raise ConfigError(
            "study.method tpe: pre-trainings are run before the first trial, so their points are known then; search "
            "them at random or on a grid"
        )


def _adaptive(config: Config) -> dict[str, str]:
    chosen = {"method": config.study.method, "stopping": config.study.stopping}
    return {key: value for key, value in chosen.items() if value not in ("random", "none")}


def _check_stopping(config: Config) -> None:
    study, steps = config.study, config.finetune
    if len(study.objectives) > 1:
        raise ConfigError("study.objectives: stopping looks at Dice alone; leave seconds or study.stopping out")
    if study.grace_steps % steps.curve_every:
        raise ConfigError(
            f"study.grace_steps {study.grace_steps}: Dice is measured every {steps.curve_every} steps "
            "(finetune.curve_every); give a multiple of it"
        )
    if study.grace_steps >= steps.steps:
        raise ConfigError(
            f"study.grace_steps {study.grace_steps}: a trial ends at step {steps.steps} (finetune.steps); give fewer"
        )
    for key in ("finetune.steps", "finetune.curve_every", "finetune.curve_scans"):
        if key in study.search:
            raise ConfigError(f"study.search: trials of other {key} cannot be compared on their way; leave it out")


def _check_values(config: Config, key: str, description: Mapping[str, Any], read: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a range or set with a value that the setting may not have."""
    where = f"study.search.{key}"
    kinds = [kind for kind in description if kind != WHEN]
    if len(kinds) != 1 or kinds[0] not in (*RANGES, *SETS):
        forms = ", ".join([f"{{{kind}: [low, high]}}" for kind in RANGES] + [f"{{{kind}: [values]}}" for kind in SETS])
        raise ConfigError(f"{where}: {dict(description)} is not one of {forms}")
    kind, values = kinds[0], description[kinds[0]]
    if kind in RANGES:
        values = _checked_range(where, kind, values)
    elif not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"{where}: {kind} needs a list of values, not {values!r}")
    if WHEN in description:
        _check_condition(where, key, description[WHEN], config.study.search)
    for value in values:
        _check_setting(config, key, value, read)


def _checked_range(where: str, kind: str, values: Any) -> tuple[Any, ...]:
    """Both ends, and a value between them as it may be drawn."""
    wanted = int if kind == "randint" else (int, float)
    match values:
        case [low, high] if all(isinstance(edge, wanted) and not isinstance(edge, bool) for edge in (low, high)):
            if low >= high:
                raise ConfigError(f"{where}: {kind} [{low}, {high}] does not rise; give the lower edge first")
            if kind == "loguniform" and low <= 0:
                raise ConfigError(f"{where}: loguniform [{low}, {high}] has no logarithm; give a lower edge above 0")
            return (low, high - 1) if kind == "randint" else (low, low + 0.618 * (high - low), high)
    what = "two whole numbers" if kind == "randint" else "two numbers, as 0.001 or 1.0e-3"
    raise ConfigError(f"{where}: {kind} needs {what}, not {values!r}")


def _check_condition(where: str, key: str, condition: Any, search: Space) -> None:
    if not isinstance(condition, Mapping) or len(condition) != 1:
        raise ConfigError(f"{where}: when needs one {{key: value}}, not {condition!r}")
    ((other, value),) = condition.items()
    before = list(search)[: list(search).index(key)]
    if other not in before:
        raise ConfigError(
            f"{where}: when looks at {other}, which is not searched before it; move it up, or leave it out"
        )
    values = next((search[other][kind] for kind in SETS if kind in search[other]), None)
    if values is None or value not in values:
        raise ConfigError(f"{where}: {other} never is {value!r}; its values: {values or 'a range'}")


def _check_setting(config: Config, key: str, value: Any, read: tuple[str, ...]) -> None:
    """Raise `ConfigError` for what a trial would refuse, or would not read."""
    try:
        settings = replace(config, {key: value})
    except ConfigError as error:
        raise ConfigError(f"study.search: {error}") from None
    if key.startswith(SEARCHED) and read == READ:
        raise ConfigError(f"study.search: a trial does not read {key}; it is pre-training's, for which give --shards")
    if not key.startswith(read):
        raise ConfigError(f"study.search: a trial does not read {key}; search settings of finetune")
    check_size("finetune.patch_size", settings.network, settings.finetune.patch_size)


def points(config: Config) -> list[dict[str, Any]]:
    """The points of a search at random or on a grid, without settings whose `when` does not hold."""
    space = config.study.search
    is_drawn = any(not set(one) & set(SETS) for one in space.values())  # and so no point comes again
    found: dict[Any, dict[str, Any]] = {}
    for point in draw({key: _without_when(one) for key, one in space.items()}, config.study.samples, SEED):
        kept: dict[str, Any] = {}
        for key in space:
            if _holds(space[key], kept):
                kept[key] = point[key]
        found.setdefault(len(found) if is_drawn else repr(kept), kept)
    return list(found.values())


def heaviest(config: Config) -> list[dict[str, Any]]:
    """Points of which one takes as much memory as any of the search: all combinations of the settings that memory
    depends on, of ranges their upper edge."""
    weighty = {key: one for key, one in config.study.search.items() if key.startswith(WEIGHTY)}
    space = {}
    for key, one in weighty.items():
        ((kind, values),) = _without_when(one).items()
        kept = {key: value for key, value in one.items() if key == WHEN and set(value) <= weighty.keys()}
        space[key] = {"grid": values if kind in SETS else [values[1] - (kind == "randint")]} | kept
    return points(replace(config, {"study.search": space, "study.samples": 1}))


def _without_when(description: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: values for kind, values in description.items() if kind != WHEN}


def _holds(description: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    return all(other in chosen and chosen[other] == value for other, value in description.get(WHEN, {}).items())


def early_stopping(config: Config) -> EarlyStopping | None:
    study = config.study
    if study.stopping == "none":
        return None
    return EarlyStopping(study.stopping, "dice", config.finetune.steps, study.grace_steps, study.reduction)


def described(config: Config) -> str:
    """The search in a few lines, as it is printed before the first trial."""
    study = config.study
    lines = [f"search: {study.samples} draws by {study.method}, on {len(config.budget.development)} development scans"]
    if study.method == "tpe":
        lines[0] += f", for {' and '.join(study.objectives)}"
    if study.stopping != "none":
        lines.append(f"  stopped early by {study.stopping}, from step {study.grace_steps} of {config.finetune.steps}")
        if (risen := _risen(config)) > study.grace_steps:
            lines[-1] += f", though learning rates rise up to step {risen}: later, a search keeps more of what is best"
    for key, description in study.search.items():
        ((kind, values),) = _without_when(description).items()
        when = "".join(f", where {other} is {value}" for other, value in description.get(WHEN, {}).items())
        shown = " to ".join(map(str, values)) if kind in RANGES else ", ".join(map(str, values))
        lines.append(f"  {key}: {kind} {shown}{when}")
    return "\n".join(lines)


def _risen(config: Config) -> int:
    """Step by which every trial's learning rates have risen: before, it is judged by how they rise."""
    searched = config.study.search.get("finetune.warmup_fraction", {"choice": [config.finetune.warmup_fraction]})
    ((_, values),) = _without_when(searched).items()
    return round(config.finetune.steps * max(values))


class Tpe:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), for one objective or several.

    A proposal depends on its number and on what has been told alone, so that a search that was interrupted goes on as
    it would have. What was stopped early counts by its curve.
    """

    def __init__(self, space: Space, objectives: Sequence[str]) -> None:
        try:
            import optuna
        except ImportError:
            raise SearchError("study.method tpe: needs Optuna; pip install 'mixcl-dist[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        ways = optuna.study.StudyDirection
        directions = [ways.MAXIMIZE if name == "dice" else ways.MINIMIZE for name in objectives]
        self._optuna, self._space, self._objectives = optuna, space, tuple(objectives)
        self._study = optuna.create_study(directions=directions)
        self._asked: dict[str, Any] = {}

    def propose(self, name: str, number: int) -> dict[str, Any]:
        """Settings by dotted key for the trial `name`."""
        sampler = self._optuna.samplers.TPESampler(seed=SEED + number, constant_liar=True)
        self._study.sampler = sampler
        trial = self._asked[name] = self._study.ask()
        chosen: dict[str, Any] = {}
        for key, description in self._space.items():
            if _holds(description, chosen):
                chosen[key] = self._value(trial, key, description)
        return chosen

    def tell(self, name: str, params: Mapping[str, Any], figures: Mapping[str, float | None], stopped: bool,
             reports: Sequence[tuple[int, float]]) -> None:  # fmt: skip
        """How a trial ended; `figures` by objective, with None where the trial failed."""
        optuna = self._optuna
        known = [value for key in self._objectives if (value := figures.get(key)) is not None]
        state = optuna.trial.TrialState.COMPLETE
        values: list[float] | None = known
        if stopped or len(known) < len(self._objectives):
            state, values = optuna.trial.TrialState.PRUNED if stopped else optuna.trial.TrialState.FAIL, None
        if (asked := self._asked.pop(name, None)) is not None:
            for step, dice in reports if len(self._objectives) == 1 else ():
                asked.report(dice, step)
            self._study.tell(asked, values, state=state)
            return
        active = {key: self._space[key] for key in self._space if key in params}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values,
                params={key: self._index(key, params[key]) for key in active},
                distributions={key: self._distribution(one) for key, one in active.items()},
                intermediate_values=dict(reports) if len(self._objectives) == 1 else {},
            )
        )

    def _value(self, trial: Any, key: str, description: Mapping[str, Any]) -> Any:
        match _without_when(description):
            case {"uniform": [low, high]}:
                return trial.suggest_float(key, low, high)
            case {"loguniform": [low, high]}:
                return trial.suggest_float(key, low, high, log=True)
            case {"randint": [low, high]}:
                return trial.suggest_int(key, low, high - 1)
            case {"grid": [*values]} | {"choice": [*values]}:
                return values[trial.suggest_categorical(key, range(len(values)))]  # Optuna takes no lists for values
        raise SearchError(f"search for {key}: {dict(description)} is no range and no set")

    def _index(self, key: str, value: Any) -> Any:
        values = next((self._space[key][kind] for kind in SETS if kind in self._space[key]), None)
        return value if values is None else list(values).index(value)

    def _distribution(self, description: Mapping[str, Any]) -> Any:
        kinds = self._optuna.distributions
        match _without_when(description):
            case {"uniform": [low, high]}:
                return kinds.FloatDistribution(low, high)
            case {"loguniform": [low, high]}:
                return kinds.FloatDistribution(low, high, log=True)
            case {"randint": [low, high]}:
                return kinds.IntDistribution(low, high - 1)
            case {"grid": [*values]} | {"choice": [*values]}:
                return kinds.CategoricalDistribution(range(len(values)))
        raise SearchError(f"search: {dict(description)} is no range and no set")
