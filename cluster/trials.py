"""Many trials under Ray Tune: run a given function on each of them, side by side, and tell how each ended."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic.dataclasses
from pydantic import ConfigDict, Field, WrapValidator

from mixcl_dist.cluster.errors import ClusterError
from mixcl_dist.cluster.ray import check_resources, check_shared, connection

AT_ONCE = 500
"""Trials of one Tune experiment, whose time and memory a trial grow with their number."""
MEASURED = "measured"
STEP = "step"
"""Figure of a report that says how far the trial is."""
Figures = Mapping[str, float]
Report = Callable[[Figures], None]


def _gpus(value: Any, inner: Callable[[Any], float | str]) -> float | str:
    try:
        found = inner(value)
    except ValueError:
        found = math.nan
    if isinstance(found, str) or found <= 1 or found.is_integer():
        return found
    raise ValueError("give 0, a share up to 1, a whole number, or measured")


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True))
class TrialsConfig:
    """What each trial may use and where Ray runs."""

    address: str | None = None
    """Ray cluster to join ("auto" or host:port); None starts Ray on this machine and ends it afterwards."""
    cpus: Annotated[int, Field(ge=1, le=10**6, strict=True)] = 1
    """CPU cores of one trial."""
    gpus: Annotated[Annotated[float, Field(ge=0, le=10**6)] | Literal["measured"], WrapValidator(_gpus)] = 0.0
    """GPUs of one trial; a share lets trials sit on one GPU together, each with no more than that share of its memory;
    `measured` takes the share whose memory a few steps of a trial need, which are tried out first."""
    concurrent: Annotated[int, Field(ge=0, le=10**6, strict=True)] = 0
    """Most trials at once; 0 leaves it to the resources."""
    memory_gb: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    """Main memory of one trial, in GB: no more of them sit on a machine than fit, and one that asks for more fails; 0
    sets no bound."""
    max_failures: Annotated[int, Field(ge=0, le=1000, strict=True)] = 1
    """How often a trial that failed, or whose machine was lost, is started again."""

    @property
    def gpu_share(self) -> float:
        """GPUs of one trial as a number: one whole of which it is not known how much is needed."""
        return 1.0 if isinstance(self.gpus, str) else self.gpus


class SearchError(ClusterError):
    """A search space that cannot be read; the message is one line with the cure."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: what its function returned, or the last line of its error, or stopped early (neither)."""

    trial: dict[str, Any]
    result: dict[str, Any] | None = None
    error: str | None = None
    log: Path | None = None
    """File with the whole error."""


@dataclass(frozen=True)
class EarlyStopping:
    """Ends trials whose metric (the higher the better) falls behind that of others after as many steps.

    ASHA (Li et al. 2020, arXiv:1810.05934) looks after `grace` steps and `reduction` times as many again and again, and
    goes on with the best 1/`reduction` of what has come there so far; median stopping (Golovin et al. 2017) looks from
    `grace` on at every report, and goes on where a trial's best is no worse than the median of the others' means.
    """

    method: Literal["asha", "median"]
    metric: str
    longest: int
    """Steps of a whole trial."""
    grace: int
    reduction: float = 3.0

    def scheduler(self) -> Any:
        """Tune's own, which needs no state beyond what was reported."""
        from ray.tune import schedulers

        known: dict[str, Any] = {"time_attr": STEP, "metric": self.metric, "mode": "max", "grace_period": self.grace}
        if self.method == "median":  # it would pause what cannot be judged yet, to no end here
            return schedulers.MedianStoppingRule(**known, min_time_slice=math.inf)  # type: ignore[arg-type]
        last = self.longest - 1  # one that has come to its end is not stopped there
        return schedulers.ASHAScheduler(**known, max_t=last, reduction_factor=self.reduction, stop_last_trials=False)


def run_trials(
    function: Callable[[dict[str, Any], Report], dict[str, Any]],
    trials: Iterable[dict[str, Any]],
    *,
    storage: Path,
    read: Sequence[Path] = (),
    config: TrialsConfig,
    ended: Callable[[Outcome], None],
    reported: Callable[[dict[str, Any], Figures], None] = lambda trial, figures: None,
    early: EarlyStopping | None = None,
    earlier: Iterable[Sequence[Figures]] = (),
) -> None:
    """Call `function(trial, report)` for each of `trials`, as many at once as resources allow, in other processes.

    `trials` are asked for one by one, when there is room: what comes later may depend on what has `ended`, which is
    called here, in this process, as soon as a trial is done, was stopped early or has failed for good; a failure does
    not touch the others. Each trial has an "id" of its own. In it `report({"step": n, …})` gives figures to `reported`
    and to `early`; a trial that is stopped early does not come back from it.

    A trial whose process ended, or whose machine was lost, is called again up to `max_failures` times; so it is by the
    next call after this process was killed, with what it had reported as its "reported". It goes on from whatever the
    function itself keeps, and may report the same again. `earlier` is what trials had reported that ended before this
    call, to which others are compared, too.

    Every `AT_ONCE` trials are a new Tune experiment in `storage`, which keeps memory and time a trial constant, and
    leaves earlier ones as they are: restoring one would bring back its resources and limits, the very things to change
    after a crash. Machines of a cluster must see the folder `storage` and the paths `read` as this one does. Raises
    `RayError` where they do not, where there is no cluster, or where it could never run a trial; `SearchError`
    where trials do not report the metric by which they are to be stopped; `KeyboardInterrupt` where the user ends it.
    """
    source, rule = iter(trials), _Rule(early, earlier) if early else None
    with joined(config, storage, read):
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its folder
        while (first := next(source, None)) is not None:
            some = _Some(first, source, rule, ended, reported, storage.resolve())
            _experiment(function, some, config)
            gc.collect()  # Tune's trials refer to each other
            if some.problem:
                raise SearchError(some.problem)
            if some.left:
                raise KeyboardInterrupt  # Tune takes the signal and returns


@contextmanager
def joined(config: TrialsConfig, storage: Path, read: Sequence[Path]) -> Iterator[None]:
    """A connection to a Ray that can run such trials, whose machines all see `storage` and `read`; raises
    `ClusterError`."""
    variables = {"OMP_NUM_THREADS": str(config.cpus)}
    if not config.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # else every trial that asked for none would take the first
    with connection(config.address or "local", option="trials.address", variables=variables):
        check_resources(
            {
                "trials.cpus": ("CPU", config.cpus),
                "trials.gpus": ("GPU", config.gpu_share),
                "trials.memory_gb": ("memory", config.memory_gb),
            },
            on_one_machine=True,
        )
        if config.address:
            check_shared(storage, read)
        yield


def _experiment(
    function: Callable[[dict[str, Any], Report], dict[str, Any]], some: _Some, config: TrialsConfig
) -> None:
    from ray import tune

    def trainable(parameters: dict[str, Any]) -> None:
        _limit_memory(config)
        report = lambda figures: tune.report({**figures, "reported": dict(figures)})  # noqa: E731
        tune.report({"returned": function(parameters["trial"], report), "over": True})

    resources = {"cpu": config.cpus, "gpu": config.gpu_share, "memory": config.memory_gb * 1e9}
    tuner = tune.Tuner(
        tune.with_resources(trainable, {name: amount for name, amount in resources.items() if amount or name == "cpu"}),
        tune_config=tune.TuneConfig(
            num_samples=AT_ONCE,
            max_concurrent_trials=config.concurrent or None,
            search_alg=some.searcher(),
            scheduler=some.scheduler(),
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
            reuse_actors=True,  # starting a process takes longer than a small trial
        ),
        run_config=tune.RunConfig(
            name=_new_name(some.storage),
            storage_path=str(some.storage),
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[some.callback()],
            verbose=0,
        ),
    )
    tuner.fit()


def _limit_memory(config: TrialsConfig) -> None:
    """What asks for more than its share fails by itself, instead of whatever the system would end for it."""
    if config.memory_gb:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(config.memory_gb * 1e9), most))
    if 0 < config.gpu_share < 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(config.gpu_share)


class _Some:
    """Up to `AT_ONCE` trials of a source: what Tune is told of them and what it tells, all in this process."""

    def __init__(
        self,
        first: dict[str, Any],
        source: Iterator[dict[str, Any]],
        rule: _Rule | None,
        ended: Callable[[Outcome], None],
        reported: Callable[[dict[str, Any], Figures], None],
        storage: Path,
    ) -> None:
        self.storage = storage
        self.source, self.rule = chain([first], islice(source, AT_ONCE - 1)), rule
        self.ended, self.reported = ended, reported
        self.left: dict[str, list[Figures]] = {}
        """Trials that have not ended → what they have reported."""
        self.problem = ""

    def next(self) -> dict[str, Any] | None:
        trial = None if self.problem else next(self.source, None)
        if trial is not None:
            self.left[trial["id"]] = list(trial.get("reported", ()))
        return trial

    def hear(self, trial: dict[str, Any], figures: Figures) -> None:
        curve = self.left[trial["id"]]
        if not curve or figures[STEP] > curve[-1][STEP]:  # one that was begun again comes by where it was
            curve.append(figures)
            self.reported(trial, figures)

    def end(self, outcome: Outcome) -> None:
        del self.left[outcome.trial["id"]]
        self.ended(outcome)

    def searcher(self) -> Any:
        from ray.tune.search import Searcher

        some = self

        class Source(Searcher):
            def suggest(self, trial_id: str) -> Any:
                trial = some.next()
                return Searcher.FINISHED if trial is None else {"trial": trial}

            def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...
            def save(self, checkpoint_path: str) -> None: ...
            def restore(self, checkpoint_path: str) -> None: ...
            def __reduce__(self):  # Tune pickles it, but the source belongs to this process
                return Searcher, ()

        return Source()

    def scheduler(self) -> Any:
        from ray.tune.schedulers import FIFOScheduler

        if self.rule is None:
            return None
        some, rule = self, self.rule

        class Scheduler(FIFOScheduler):
            def on_trial_add(self, controller: Any, trial: Any) -> None:
                name = _trial_id(trial)
                rule.add(name, some.left[name])

            def on_trial_result(self, controller: Any, trial: Any, result: dict) -> str:
                name = _trial_id(trial)
                curve = some.left[name]
                if rule.metric in result and (not curve or result[STEP] > curve[-1][STEP]):
                    return rule.judged(name, result)
                if "over" in result and not curve:
                    what = f"trials report no {rule.metric}"
                    some.problem = f"{what}, so none can be stopped by it; search without stopping"
                return self.CONTINUE

            def __reduce__(self):
                return FIFOScheduler, ()

        return Scheduler()

    def callback(self) -> Any:
        from ray import tune

        some = self

        class Telling(tune.Callback):
            def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
                if "reported" in result:
                    some.hear(trial.config["trial"], result["reported"])

            def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                some.end(Outcome(trial.config["trial"], trial.last_result.get("returned")))

            def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                text = Path(trial.error_file).read_text()  # among this machine's temporary files
                log = some.storage / "failed" / f"{_trial_id(trial)}.txt"
                log.parent.mkdir(exist_ok=True)
                log.write_text(text)
                some.end(Outcome(trial.config["trial"], error=text.strip().splitlines()[-1], log=log))

            def __reduce__(self):
                return tune.Callback, ()

        return Telling()


class _Rule:
    """Tune's own of `early`, which outlives its experiments, and knows what was reported before the first."""

    def __init__(self, early: EarlyStopping, earlier: Iterable[Sequence[Figures]]) -> None:
        self.metric, self._rule = early.metric, early.scheduler()
        for number, curve in enumerate(earlier):
            self.add(f"earlier-{number}", curve)

    def add(self, name: str, curve: Sequence[Figures]) -> None:
        """A trial that was let through at each point of its curve."""
        self._rule.on_trial_add(None, _Named(name))
        for figures in curve:
            self.judged(name, figures)

    def judged(self, name: str, figures: Figures) -> str:
        """Whether a trial goes on."""
        return self._rule.on_trial_result(None, _Named(name), {key: figures[key] for key in (STEP, self.metric)})


@dataclass(frozen=True)
class _Named:
    """Stands for a trial of Tune, which would keep its whole experiment."""

    trial_id: str


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


def _trial_id(trial: Any) -> str:
    return trial.config["trial"]["id"]


def _new_name(storage: Path) -> str:
    """A name that no experiment in `storage` has: Tune would write over it."""
    number = 1
    while (storage / f"experiment-{number}").exists():
        number += 1
    return f"experiment-{number}"
