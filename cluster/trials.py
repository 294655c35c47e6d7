"""Many trials under Ray Tune: run a given function on each of them, side by side, and tell how each ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic.dataclasses
from pydantic import ConfigDict, Field

from mixcl_dist.cluster.ray import check_resources, check_shared, connection


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True))
class TrialsConfig:
    """What each trial may use and where Ray runs."""

    address: str | None = None
    """Ray cluster to join ("auto" or host:port); None starts Ray on this machine and ends it afterwards."""
    cpus: Annotated[int, Field(ge=1, le=10**6, strict=True)] = 1
    """CPU cores of one trial."""
    gpus: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    """GPUs of one trial; a share lets trials sit on one GPU together."""
    concurrent: Annotated[int, Field(ge=0, le=10**6, strict=True)] = 0
    """Most trials at once; 0 leaves it to the resources."""
    max_failures: Annotated[int, Field(ge=0, le=1000, strict=True)] = 1
    """How often a trial that failed is started again."""


class SearchError(ValueError):
    """A search space that cannot be read; the message is one line with the cure."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: what its function returned, or the last line of its error."""

    trial: dict[str, Any]
    result: dict[str, Any] | None
    error: str | None


def run_trials(
    function: Callable[[dict[str, Any]], dict[str, Any]],
    trials: Sequence[dict[str, Any]],
    *,
    storage: Path,
    read: Sequence[Path] = (),
    config: TrialsConfig,
    ended: Callable[[Outcome], None],
) -> None:
    """Call `function(trial)` for each of `trials` in its own process, as many at once as resources allow.

    `ended` is called here, in this process, as soon as a trial is done or has failed for good; a failure does
    not touch the others. Each trial has an "id" of its own.

    A trial runs from its beginning or not at all, so an interrupted table is gone on with by passing the
    trials that are not done. Each call is a new Tune experiment in `storage` and leaves earlier ones as they
    are: restoring one would bring back its resources and limits, the very things to change after a crash.
    Machines of a cluster must see the folder `storage` and the paths `read` as this one does. Raises `ClusterError`
    where they do not, where there is no cluster, or where it could never run a trial.
    """
    from ray import tune

    def trainable(parameters: dict[str, Any]) -> None:
        tune.report({"returned": function(parameters["trial"])})

    variables = {"OMP_NUM_THREADS": str(config.cpus)}
    if not config.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # else every trial that asked for none would take the first
    with connection(config.address or "local", option="trials.address", variables=variables):
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its folder
        check_resources({"trials.cpus": ("CPU", config.cpus), "trials.gpus": ("GPU", config.gpus)})
        if config.address:
            check_shared(storage, read)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": config.cpus, "gpu": config.gpus}),
            param_space={"trial": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=config.concurrent or None,
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=tune.RunConfig(
                name=_new_name(storage),
                storage_path=str(storage.resolve()),
                failure_config=tune.FailureConfig(max_failures=config.max_failures),
                callbacks=[_telling(ended)],
                verbose=0,
            ),
        )
        tuner.fit()


def draw(search: Mapping[str, Mapping[str, Sequence[Any]]], samples: int, seed: int) -> list[dict[str, Any]]:
    """Points of a search space: `samples` random ones for each combination of its grids, by `seed` alone.

    `search` maps a parameter's name to {"grid": [values]}, {"choice": [values]}, {"uniform": [low, high]},
    {"loguniform": [low, high]} or {"randint": [low, high]}. Without any parameter there is one point, {}.
    Raises `SearchError` for anything else.
    """
    if not search:
        return [{}]
    import numpy as np
    from ray.tune.search.variant_generator import generate_variants

    space = {name: _domain(name, description) for name, description in search.items()}
    rng = np.random.default_rng(seed)
    return [point for _ in range(samples) for _, point in generate_variants(space, random_state=rng)]


def _domain(name: str, description: Mapping[str, Sequence[Any]]) -> Any:
    from ray import tune

    ranges = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
    sets = {"grid": tune.grid_search, "choice": tune.choice}
    match list(description.items()):
        case [(kind, [low, high])] if kind in ranges:
            return ranges[kind](low, high)
        case [(kind, [*values])] if kind in sets and values:
            return sets[kind](values)
    forms = [*(f"{{{kind}: [low, high]}}" for kind in ranges), *(f"{{{kind}: [values]}}" for kind in sets)]
    raise SearchError(f"search for {name}: {dict(description)} is not one of {', '.join(forms)}")


def _telling(ended: Callable[[Outcome], None]) -> Any:
    """A Tune callback that reports each trial's end to `ended`."""
    from ray import tune

    class Telling(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            ended(Outcome(trial.config["trial"], trial.last_result["returned"], None))

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            lines = Path(trial.error_file).read_text().strip().splitlines()
            ended(Outcome(trial.config["trial"], None, lines[-1]))

        def __reduce__(self):  # Tune pickles its callbacks, but `ended` belongs to this process
            return tune.Callback, ()

    return Telling()


def _trial_id(trial: Any) -> str:
    return trial.config["trial"]["id"]


def _new_name(storage: Path) -> str:
    """A name that no experiment in `storage` has: Tune would write over it."""
    number = 1
    while (storage / f"experiment-{number}").exists():
        number += 1
    return f"experiment-{number}"
