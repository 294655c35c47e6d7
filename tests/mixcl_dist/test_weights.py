"""Weights come whole, of the same network and finite, or not at all."""

import math
import pathlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from mixcl_dist.errors import RunError
from mixcl_dist.weights import load_weights


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def refused(path, said):
    with pytest.raises(RunError, match=said) as error:
        load_weights(torch.nn.Linear(2, 1), path, problem="does not fit", cure="train it again")
    assert str(error.value).startswith(f"{path}: does not fit (") and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    save_file({"weight": torch.tensor([[0.0, value]]), "bias": torch.zeros(1)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", r"\(weight is not finite\); train it again")


@pytest.mark.parametrize("content", [b"", b"x" * 100, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors", "train it again")


def test_a_pickle_in_its_place_runs_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    refused(path, "train it again")
    torch.save({"weight": Trap(tmp_path / "ran")}, path)
    refused(path, "train it again")
    assert not (tmp_path / "ran").exists()
