"""How good are a network's voxel features, before anything is fine-tuned? A frozen linear and a k-NN probe.

Classifiers are fitted to voxels of some development scans and judged on others, so that variants of pre-training can be
ranked in a minute. The features are those of the whole decoder pyramid, which every network has, a random one too.

Legend: N patches, (X, Y, Z) their size, C classes.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mixcl_dist.config import Config, ConfigError
from mixcl_dist.data_shards.building.dedup import scans_of_shards
from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.data_shards.format.manifest import CASES_FILE, Manifest
from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.streaming.reader import SampleReader, Wanted
from mixcl_dist.errors import RunError
from mixcl_dist.intensity import normalise
from mixcl_dist.linear import Voxels, fit, of_levels, sample
from mixcl_dist.networks.architectures import build_backbone, check_patches
from mixcl_dist.networks.backbone import Backbone
from mixcl_dist.precision import autocast
from mixcl_dist.records import RUN, NetworkRecord, ProbeRecord, ProbeScans, ProbeScores
from mixcl_dist.seen import Seen, likeness, one_patient, shared_scans
from mixcl_dist.weights import load_weights

PATCHES_AT_ONCE = 4
NEIGHBOURS = 15
NEIGHBOUR_VOXELS = 15_000
"""Voxels at most that neighbours are looked for among, and that are classified by them."""


@dataclass(frozen=True)
class Patches:
    """Labelled patches of scans, in main memory."""

    hu: np.ndarray
    """(N, X, Y, Z) int16."""
    label: np.ndarray
    """(N, X, Y, Z) uint8: 0 where no class lies that is known there, k for class k - 1, or `IGNORED`."""
    known: np.ndarray
    """(N, C + 1) bool: which classes are reliably annotated, entry 0 (background) False."""
    case: np.ndarray
    """(N,) number of the scan."""

    def of(self, cases: np.ndarray, divisor: Sequence[int]) -> Patches:
        """Those of some scans, with edges cut off to multiples of `divisor`."""
        chosen = np.isin(self.case, cases)
        x, y, z = (edge // step * step for edge, step in zip(self.hu.shape[1:], divisor, strict=True))
        hu, label = (array[chosen, :x, :y, :z] for array in (self.hu, self.label))
        return Patches(hu, label, self.known[chosen], self.case[chosen])


def probe_run(path: Path | None, config: Config, *, shards: Path | str) -> ProbeRecord:
    """Probe the network that a pre-training run, or one of its checkpoints, left in the folder `path`; None is a random
    network of `config`. The scans are `config.budget.development`, which must be in `shards` and which the run must not
    have seen.

    Raises `RunError`, `ConfigError` or the shards' errors, each one line with the cure.
    """
    development = config.budget.development
    if len(development) < 2:
        raise ConfigError("budget.development names no two scans to probe on; give them, e.g. by --recipe few_label")
    check_patches(config.network, Manifest.load(shards).patch_size)
    torch.manual_seed(0)
    backbone = build_backbone(config.network)
    if path is not None:
        _refuse_seen(path, shards, development, config.budget.distinct_patients)
        cure = "give a finished run or a whole checkpoint"
        if path == run_of(path):
            NetworkRecord.load(path).check(path / "network.safetensors")
        load_weights(backbone, path / "network.safetensors", problem="cannot be loaded", cure=cure)
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.monotonic()
    patches, classes = read_patches(shards, development)
    try:
        found = probe(backbone, patches, classes, config.network.window_hu)
    except RunError as error:
        raise RunError(f"{path or 'random network'}: {error}") from None
    return dataclasses.replace(found, cases=tuple(development), seconds=round(time.monotonic() - begin, 1))


def run_of(path: Path) -> Path:
    """The folder of the run that `path`, a run or a checkpoint in it, belongs to."""
    return path if (path / RUN).exists() else path.parent.parent


def _refuse_seen(
    path: Path, shards: Path | str, development: Sequence[str], distinct: Sequence[tuple[str, str]]
) -> None:
    scans = [scan for scan in scans_of_shards(shards) if scan.name in development]
    if shared := one_patient(shared_scans(Seen.load(run_of(path)), scans), distinct):
        name, seen_as = shared[0].pair
        alias = "" if name == seen_as else f"there {seen_as}, "
        how, otherwise = likeness(shared[0], distinct, f"SHARDS --against {shlex.quote(str(shards))}")
        raise RunError(
            f"{path}: was pre-trained on development scan {name} ({alias}{how}); pre-train with --budget.development "
            f"{','.join(development)}{otherwise}"
        )


def read_patches(shards: Path | str, names: Sequence[str]) -> tuple[Patches, tuple[str, ...]]:
    """All patches of the named scans, numbered as named, and the classes; raises `RunError`, or the shards' errors."""
    store = open_store(shards)
    manifest = Manifest.load(store)
    number = {case.name: n for n, case in enumerate(manifest.cases)}
    if missing := [name for name in names if name not in number]:
        raise RunError(f"{shards}: holds no case {missing[0]}; give the shards that the development scans are in")
    case_of_sample = manifest.read_table(store, CASES_FILE).astype(int)
    samples = np.flatnonzero(np.isin(case_of_sample, [number[name] for name in names]))
    hu = np.empty((len(samples), *manifest.patch_size), np.int16)
    label = np.empty(hu.shape, np.uint8)
    wanted = [Wanted(row, row, 0, int(sample), True) for row, sample in enumerate(samples)]
    if causes := [outcome.cause for outcome in SampleReader(store, manifest).read(wanted, hu, label) if outcome.cause]:
        raise RunError(f"{shards}: {causes[0]}; see `mixcl shards verify`")
    known = np.array([[False, *(c in case.reliable for c in manifest.classes)] for case in manifest.cases])
    number_of = np.zeros((len(manifest.cases), IGNORED + 1), np.uint8)
    number_of[:, : known.shape[1]] = known * np.arange(known.shape[1])
    number_of[:, IGNORED] = IGNORED
    for patch, case in zip(label, case_of_sample[samples], strict=True):
        patch[...] = number_of[case][patch]
    place = {number[name]: n for n, name in enumerate(names)}
    cases = np.array([place[case] for case in case_of_sample[samples]], dtype=int)
    return Patches(hu, label, known[case_of_sample[samples]], cases), manifest.classes


@torch.no_grad()
def probe(backbone: Backbone, patches: Patches, classes: Sequence[str], window_hu: tuple[float, float]) -> ProbeRecord:
    """Dice of both probes, by class and in the mean, on the scans of odd numbers after fitting on those of even ones.

    The linear probe is judged on every voxel, k-NN on sampled ones that stand for all. Raises `RunError` where the
    features are not finite or all alike.
    """
    scans = np.unique(patches.case)
    fitted, judged = (patches.of(scans[part::2], backbone.level_divisor) for part in (0, 1))
    training = backbone.training
    backbone.eval()
    try:
        counts = _judge(backbone, fitted, judged, window_hu)
    finally:
        backbone.train(training)
    found = {kind: _dice(of_kind, judged, classes) for kind, of_kind in counts.items()}
    if found["linear"].mean is None:
        raise RunError("no judged development scan shows a class that is annotated there; name others")
    parts = ProbeScans(fitted=len(scans[::2]), judged=len(scans[1::2]))
    return ProbeRecord(linear=found["linear"], knn=found["knn"], scans=parts)


def _judge(
    backbone: Backbone, fitted: Patches, judged: Patches, window_hu: tuple[float, float]
) -> dict[str, np.ndarray]:
    """Of each probe (N, 3, C + 1) voxels of each class of each judged patch that are found, drawn, and both."""
    voxels = Voxels.joined(_sample(fitted, *part) for part in _pyramids(backbone, fitted, window_hu))
    if not torch.isfinite(voxels.features).all() or (voxels.features.std(0) > 1e-6).sum() < 2:
        cure = "pre-train with a lower --optimizer.learning_rate"
        raise RunError(f"the features are not finite, or alike at every voxel (the network has collapsed); {cure}")
    weight, bias = fit(voxels)
    linear, queries = [], []
    for part in _pyramids(backbone, judged, window_hu):
        linear += _judge_linear(judged, *part, weight, bias)
        queries.append(_sample(judged, *part))
    return {"linear": np.array(linear), "knn": _judge_neighbours(voxels, Voxels.joined(queries), judged)}


def _sample(patches: Patches, first: int, pyramid: list[Tensor]) -> Voxels:
    here = slice(first, first + len(pyramid[0]))
    return sample(pyramid, patches.label[here], patches.known[here], first)


def _pyramids(
    backbone: Backbone, patches: Patches, window_hu: tuple[float, float]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Number of the first patch, and the pyramid of it and some that follow."""
    device = next(backbone.parameters()).device
    for first in range(0, len(patches.hu), PATCHES_AT_ONCE):
        hu = torch.from_numpy(patches.hu[first : first + PATCHES_AT_ONCE, None]).to(device)
        with autocast(device):
            pyramid = backbone(normalise(hu, window_hu))
        yield first, pyramid  # outside, so that what is made of it is computed in float32


def _judge_linear(
    patches: Patches, first: int, pyramid: list[Tensor], weight: Tensor, bias: Tensor
) -> list[np.ndarray]:
    """Of each patch (3, C + 1) voxels of each class that are found, drawn, and both."""
    logits = bias.to(pyramid[0].device)[:, None, None, None]
    for features, of_level in zip(pyramid, of_levels(weight.to(pyramid[0].device), pyramid), strict=True):
        coarse = torch.einsum("nfxyz,cf->ncxyz", features.float(), of_level)
        logits = logits + F.interpolate(coarse, pyramid[-1].shape[2:], mode="trilinear")
    found = logits.argmax(1).flatten(1).cpu().numpy()
    drawn = patches.label[first:].reshape(-1, found.shape[1])
    return [_count(one, other, np.ones(len(one)), len(weight)) for one, other in zip(found, drawn, strict=False)]


def _judge_neighbours(voxels: Voxels, query: Voxels, patches: Patches) -> np.ndarray:
    """(N, 3, C + 1), as `_judge_linear`: the class that most of a voxel's nearest neighbours (by cosine) stand for."""
    mean, scale = voxels.features.mean(0), 1 / voxels.features.std(0).clamp_min(1e-6)
    voxels, query = voxels.thinned(NEIGHBOUR_VOXELS), query.thinned(NEIGHBOUR_VOXELS)
    ballots = F.one_hot(voxels.label, voxels.known.shape[1]) * voxels.importance[:, None]
    reference = F.normalize((voxels.features - mean) * scale, dim=1)
    found = []
    for part in F.normalize((query.features - mean) * scale, dim=1).split(1024):
        nearest = (part @ reference.T).topk(min(NEIGHBOURS, len(reference))).indices
        found.append(ballots[nearest].sum(1).argmax(1))
    predicted, label = torch.cat(found).numpy(), query.label.numpy()
    weight, patch = query.weight.numpy(), query.patch.numpy()
    return np.array([
        _count(predicted[patch == n], label[patch == n], weight[patch == n], ballots.shape[1])
        for n in range(len(patches.hu))
    ])  # fmt: skip


def _count(found: np.ndarray, drawn: np.ndarray, weight: np.ndarray, classes: int) -> np.ndarray:
    judged = drawn != IGNORED
    found, drawn, weight = found[judged], drawn[judged].astype(int), weight[judged]
    each = [(found, weight), (drawn, weight), (found, weight * (found == drawn))]
    return np.array([np.bincount(value, weights=of, minlength=classes) for value, of in each])


def _dice(counts: np.ndarray, patches: Patches, classes: Sequence[str]) -> ProbeScores:
    """Mean over scans of each class, of those in which it is known and drawn; the mean over classes; and that of each
    scan by itself, in the order of their numbers."""
    scans = np.unique(patches.case)
    per_scan = np.array([counts[patches.case == scan].sum(0) for scan in scans])
    known = np.array([patches.known[patches.case == scan][0] for scan in scans])
    found, drawn, both = per_scan.transpose(1, 0, 2)
    with np.errstate(invalid="ignore"):
        dice = np.where(known & (drawn > 0), 2 * both / (found + drawn), np.nan)
    of_class = {
        name: None if np.isnan(column).all() else round(float(np.nanmean(column)), 4)
        for name, column in zip(classes, dice.T[1:], strict=True)
    }
    shown = [value for value in of_class.values() if value is not None]
    of_scan = tuple(None if np.isnan(row).all() else round(float(np.nanmean(row)), 4) for row in dice)
    return ProbeScores(mean=round(float(np.mean(shown)), 4) if shown else None, dice=of_class, scans=of_scan)
