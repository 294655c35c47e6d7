"""Many trials under Ray Tune: run a given function on each of them, side by side, and tell how each ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OBJECT_STORE_BYTES = 100_000_000
"""Trials hand Ray no arrays."""


@dataclass(frozen=True)
class TrialsConfig:
    """What each trial may use and where Ray runs."""

    address: str | None = None
    """Ray cluster to join ("auto" or host:port); None starts Ray on this machine and ends it afterwards."""
    cpus: int = 1
    """CPU cores of one trial."""
    gpus: float = 0.0
    """GPUs of one trial; a share lets trials sit on one GPU together."""
    concurrent: int = 0
    """Most trials at once; 0 leaves it to the resources."""
    max_failures: int = 1
    """How often a trial that failed is started again."""


class TrialsError(ValueError):
    """Trials that cannot be started as configured; the message is one line with the cure."""


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
    config: TrialsConfig,
    ended: Callable[[Outcome], None],
) -> None:
    """Call `function(trial)` for each of `trials` in its own process, as many at once as resources allow.

    `ended` is called here, in this process, as soon as a trial is done or has failed for good; a failure does
    not touch the others. Each trial has an "id" of its own.

    A trial runs from its beginning or not at all, so an interrupted table is gone on with by passing the
    trials that are not done. Each call is a new Tune experiment in `storage` and leaves earlier ones as they
    are: restoring one would bring back its resources and limits, the very things to change after a crash.
    Raises `TrialsError` when the cluster could never run a trial.
    """
    from ray import tune

    def trainable(parameters: dict[str, Any]) -> None:
        tune.report({"returned": function(parameters["trial"])})

    with _ray(config):
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
    Raises `TrialsError` for anything else.
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
    raise TrialsError(f"search for {name}: {dict(description)} is not one of {', '.join(forms)}")


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


@contextmanager
def _ray(config: TrialsConfig) -> Iterator[None]:
    """A connection to Ray, started here unless there is an address to join; ended afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a hospital's archive is sent anywhere
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials write their own metrics
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # no tables on the terminal: `ended` tells
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of the change
    import ray

    local: dict[str, Any] = (
        {} if config.address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    )
    threads = {"OMP_NUM_THREADS": str(config.cpus)}
    try:
        ray.init(
            address=config.address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": threads},
            **local,
        )
    except ConnectionError as error:
        raise TrialsError(f"trials.address {config.address}: {error}; start Ray there, or leave it out") from None
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its folder
    try:
        _check_resources(config, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _check_resources(config: TrialsConfig, total: Mapping[str, float]) -> None:
    """Raise `TrialsError` where a trial would wait for ever."""
    for key, name, wanted in (("cpus", "CPU", config.cpus), ("gpus", "GPU", config.gpus)):
        if wanted > total.get(name, 0):
            raise TrialsError(
                f"trials.{key} {wanted:g}: Ray has {total.get(name, 0):g}; lower it or join a larger cluster"
            )


def _trial_id(trial: Any) -> str:
    return trial.config["trial"]["id"]


def _new_name(storage: Path) -> str:
    """A name that no experiment in `storage` has: Tune would write over it."""
    number = 1
    while (storage / f"experiment-{number}").exists():
        number += 1
    return f"experiment-{number}"
