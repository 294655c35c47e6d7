from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

from mixcl_dist.kernels import mixed_contrastive_loss, tiled
from mixcl_dist.kernels.relations import Contrast, row_keys

TABLE = torch.cat([torch.eye(3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)])


def rows(candidate_set: list[int], *, identity: str = "pairs", seed: int = 0) -> dict:
    n = len(candidate_set)
    generator = torch.Generator().manual_seed(seed)
    return {
        "embeddings": normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1),
        "identity": {"pairs": torch.arange(n) // 2, "across": torch.arange(n) % (n // 2)}[identity],
        "candidate_set": torch.tensor(candidate_set),
        "set_table": TABLE,
    }


def loss_and_gradient(arguments: dict, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = arguments["embeddings"].clone().requires_grad_()
    out = mixed_contrastive_loss(
        **arguments | {"embeddings": embeddings}, temperature=0.2, implementation=implementation
    )
    return out.loss, *torch.autograd.grad(out.loss, embeddings)


@pytest.mark.parametrize("range_of_s", ["narrow", "wide"])
@pytest.mark.parametrize("identity", ["pairs", "across"])
@pytest.mark.parametrize(
    "candidate_set",
    [[0] * 16 + [1] * 16 + [3] * 16, [0, 3] * 24, [0] * 30 + [1] * 18, [3] * 48],
    ids=["uniform tiles", "shuffled", "border inside a tile", "all open"],
)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_every_kind_of_tile(weights, candidate_set, identity, range_of_s, monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 8)
    if range_of_s == "wide":
        monkeypatch.setattr(tiled, "UNSHIFTED_LIMIT", 0.0)
    arguments = rows(candidate_set, identity=identity)
    arguments |= {"identity_weight": weights[0], "label_weight": weights[1]}
    got, want = (loss_and_gradient(arguments, name) for name in ("tiled", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def sorted_pairs(candidate_set: list[int], active: int) -> tiled.Pairs:
    embeddings, identity, candidate_set, table = rows(candidate_set).values()
    keys, relations, _ = row_keys(identity, candidate_set, table, None)
    return tiled._sort_pairs(Contrast(embeddings, keys, embeddings, keys, relations, torch.tensor(0.2), active))


def test_uniform_tiles_get_no_mask(monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 8)
    masked = {
        (left.start // 8, right.start // 8)
        for left, right, parts, _ in tiled._tiles(sorted_pairs([0] * 16 + [1] * 16 + [3] * 16, 0b11))
        if any(isinstance(part.members, torch.Tensor) for part in parts)
    }
    assert masked == {(i, i) for i in range(6)}


def test_tiles_of_open_pairs_are_skipped_without_the_identity_relation(monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 8)
    assert all(left == right for left, right, *_ in tiled._tiles(sorted_pairs([3] * 48, 0b10)))


MEASURE_PEAK = """
import resource, torch
from mixcl_dist.kernels import mixed_contrastive_loss
torch.set_num_threads(1)
n = 8192
z = torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_()
def step(rows):
    s = torch.zeros(rows, dtype=torch.int64)
    mixed_contrastive_loss(z[:rows], torch.arange(rows) // 2, s, torch.ones(1, 4) > 0).loss.backward()
step(1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_stays_far_below_the_similarity_matrix():
    run = subprocess.run([sys.executable, "-c", MEASURE_PEAK], capture_output=True, text=True, check=True)
    matrix_kib = 8192**2 * 4 // 1024
    assert int(run.stdout) < matrix_kib / 5
