"""A small phantom cohort and its shards, made once for all tests of the application."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from mixcl_dist import constants
from mixcl_dist.cli import main
from mixcl_dist.config import Config, load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining import objective, rows, views

SMALL = {
    "build.patch_size": "24,24,24",
    "network.filters": "4,6,8",
    "network.voxel_dim": "8",
    "network.crop_dim": "8",
    "views.size": "16,16,16",
    "rows.per_view_pair": "32",
    "pretrain.batch_size": "4",
    "pretrain.log_every": "1",
    "finetune.patch_size": "24,24,24",
    "finetune.steps": "4",
}
"""Overrides that make every stage a matter of seconds."""
BRIEF = {
    "pretrain.steps": "1",
    "finetune.steps": "2",
    "finetune.batch_size": "1",
    "data.workers": "0",
    "budget.development": "abdomen_000,abdomen_001",
}


@pytest.fixture(scope="session")
def small_config() -> Config:
    return load(overrides=list(SMALL.items()))


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> list[Path]:
    """The sources of a phantom cohort; the first is the data set to fine-tune on."""
    folder = tmp_path_factory.mktemp("cohort")
    return write_cohort(folder, training=4, validation=2, unlabelled=2, size=(40, 34, 40), spacing_mm=9.0)


@pytest.fixture(scope="session")
def shards(cohort, small_config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "shards"
    build(cohort, out, small_config.build)
    return out


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data set to fine-tune on: four training cases, each annotated in part, and one validation case."""
    folder = tmp_path_factory.mktemp("data")
    return write_cohort(folder, training=4, validation=1, unlabelled=0, size=(36, 30, 36), spacing_mm=10.0)[0]


def commands(runs: Path, shards: Path, data: Path) -> dict[str, list[str]]:
    """Of the runs of `finished`, by name, below `runs`: a pre-training, and what is fine-tuned from it."""
    settings = [word for key, value in (SMALL | BRIEF).items() for word in (f"--{key}", value)]
    start = ["--from", str(runs / "pre"), "--scans", "2"]
    return {
        "pre": ["pretrain", "--data", str(shards), "--run", str(runs / "pre"), *settings],
        "few": ["finetune", "--data", str(data), *start, "--run", str(runs / "few"), *settings],
    }


@pytest.fixture(scope="session")
def finished(shards, data, tmp_path_factory) -> Path:
    """A folder with the two runs of `commands`."""
    runs = tmp_path_factory.mktemp("finished")
    for command in commands(runs, shards, data).values():
        assert main(command) == 0
    return runs


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(finished, tmp_path / "runs")


@pytest.fixture
def again(runs, shards, data):
    """A function that gives the command of one of `runs` again, with further words."""

    def give(name: str, *words: str) -> None:
        assert main([*commands(runs, shards, data)[name], *words]) == 0

    return give


@pytest.fixture
def imagined_gpu():
    """Within it tensors are shapes on a device, "cuda:0" too: operands on two devices raise, and so does every operator
    whose result has a size or a value that the host would have to wait for. Without gradients."""
    forget_constants()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _IndexedByOperators():
        yield torch.device("cuda:0")
    forget_constants()


def forget_constants() -> None:
    """A shape that was kept as a constant would be met by other tests."""
    for module in (constants, objective, rows, views):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


class _IndexedByOperators(TorchFunctionMode):
    """Slices and integers by operators that are dispatched: indexing itself asks for a GPU's driver first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return _indexed(*args)
        if func is torch.Tensor.__setitem__:
            return torch.ops.aten.copy_(_indexed(*args[:2]), args[2])
        return func(*args, **(kwargs or {}))


def _indexed(tensor, index):
    if torch.is_tensor(index):
        return torch.ops.aten.index(tensor, [index])
    view = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")[index]
    return tensor.as_strided(view.shape, view.stride(), tensor.storage_offset() + view.storage_offset())
