"""Where a pre-training's figures are shown beside its own files: MLflow, Weights & Biases.

They are told figures, and settings that are numbers or words of this project's own: no name of a case, a data set, a
folder, a machine or a person. Each shows the steps of `metrics.jsonl` and no other: a run that goes on from a
checkpoint forgets those after it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from mixcl_dist.config import PRETRAINING, Config, ConfigError

PROJECT = "mixcl"
"""MLflow's experiment and W&B's project, where their own variables name no other."""
MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # its makers are told nothing
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is away keeps no run waiting for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
MOST_METRICS, MOST_SETTINGS = 1000, 100
"""That MLflow's server takes at once."""


class Tracker(Protocol):
    id: str
    """By which it knows the run."""

    def log(self, entries: Sequence[Mapping[str, float]]) -> None:
        """`entries` as in `metrics.jsonl`, one a logged step."""

    def close(self) -> None: ...


class Trackers:
    """Those of one run. One that fails is warned of and told nothing more: no run ends because of it.

    `begin` makes the one of a name; `warn` says a line the first time for its kind.
    """

    def __init__(self, names: Sequence[str], begin: Callable[[str], Tracker], warn: Callable[[str, str], None]) -> None:
        self._warn = warn
        self._begun: dict[str, Tracker] = {}
        for name in names:
            with self._tolerated(name):
                self._begun[name] = begin(name)

    @property
    def ids(self) -> dict[str, str]:
        """Of those that work."""
        return {name: tracker.id for name, tracker in self._begun.items()}

    def log(self, entry: Mapping[str, float]) -> None:
        for name, tracker in list(self._begun.items()):
            with self._tolerated(name):
                tracker.log([entry])

    def close(self) -> None:
        for name, tracker in list(self._begun.items()):
            with self._tolerated(name):
                tracker.close()

    @contextmanager
    def _tolerated(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of its client's or its server's own kinds
            self._begun.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            cure = "metrics.jsonl has all, and a start with --resume latest tells it all again"
            self._warn(f"tracker_{name}", f"{name} is told nothing more ({reason}); {cure}")


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` where one is not installed, or not told where to log."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"pretrain.trackers {name}: is not installed; pip install 'mixcl-dist[{name}]'")
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError("pretrain.trackers mlflow: set MLFLOW_TRACKING_URI to your server, as in http://host:5000")


def begin_tracker(
    name: str, folder: Path, config: Config, logged: Sequence[Mapping[str, float]], earlier: str | None
) -> Tracker:
    """The tracker `name` of the run in `folder`, which has `logged` so far.

    `earlier` is its id of the run, where an earlier start has told it of that.
    """
    kind = _MLflow if name == "mlflow" else _WandB
    return kind(folder, told_settings(config), logged, earlier)


def told_settings(config: Config) -> dict[str, Any]:
    """The settings of a pre-training that are numbers or choices, by dotted key."""
    told = {}
    for section in PRETRAINING:
        settings = getattr(config, section)
        kinds = typing.get_type_hints(type(settings))
        for name in (field.name for field in dataclasses.fields(settings)):
            value = getattr(settings, name)
            if _is_number(value) or (isinstance(value, str) and _is_choice(kinds[name])):
                told[f"{section}.{name}"] = value
    return told


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, tuple) and bool(value) and all(map(_is_number, value)))


def _is_choice(kind: Any) -> bool:
    return any(typing.get_origin(part) is Literal for part in (kind, *typing.get_args(kind)))


class _MLflow:
    """The server at MLFLOW_TRACKING_URI.

    A step cannot be taken back there: a run of which it shows others than are logged is told anew, and the earlier one
    deleted, which MLflow can undo.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], logged: Sequence[Mapping[str, float]], earlier: str | None
    ) -> None:
        for name, value in MLFLOW.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if earlier and self._shows(earlier, logged):
            self.id = earlier
            self._client.update_run(earlier, "RUNNING")
            return
        self.id = self._created(settings)
        self.log(logged)
        if earlier:
            self._client.delete_run(earlier)

    def _shows(self, run: str, logged: Sequence[Mapping[str, float]]) -> bool:
        """Whether these steps and no others, by a figure that is always logged."""
        steps = [entry["step"] for entry in logged]
        shown = (
            self._client.get_metric_history(run, next(name for name in logged[0] if name != "step")) if steps else []
        )
        return sorted(metric.step for metric in shown) == steps

    def _created(self, settings: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment).info.run_id
        parameters = [Param(name, str(value)) for name, value in settings.items()]
        for first in range(0, len(parameters), MOST_SETTINGS):
            self._client.log_batch(run, params=parameters[first : first + MOST_SETTINGS])
        return run

    def log(self, entries: Sequence[Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(name, value, now, int(entry["step"]))
            for entry in entries
            for name, value in entry.items()
            if name != "step"
        ]
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self.id, metrics=metrics[first : first + MOST_METRICS])

    def close(self) -> None:
        self._client.set_terminated(self.id)


class _WandB:
    """A run in the folder `wandb/` of this one, which nobody is sent: `wandb sync` does that, by hand.

    Steps cannot be taken back there, nor can such a run go on: each start tells all anew, and removes the earlier one.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], logged: Sequence[Mapping[str, float]], earlier: str | None
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        quiet = wandb.Settings(
            mode="offline",
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            x_disable_machine_info=True,
            x_disable_meta=True,  # the command line, which names folders and cases
            x_disable_stats=True,
            x_save_requirements=False,
        )
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        told = dict(settings)
        self._run = wandb.init(project=project, dir=str(folder), config=told, settings=quiet, reinit="create_new")
        self.id = self._run.id
        self.log(logged)
        for left in folder.glob(f"wandb/offline-run-*-{earlier}"):
            shutil.rmtree(left)

    def log(self, entries: Sequence[Mapping[str, float]]) -> None:
        for entry in entries:
            figures = {name: value for name, value in entry.items() if name != "step"}
            self._run.log(figures, step=int(entry["step"]))

    def close(self) -> None:
        self._run.finish()
