"""How good are a network's voxel features, before anything is fine-tuned? A frozen linear and a k-NN probe.

Classifiers are fitted to voxels of some development scans and judged on others, so that variants of pre-training can be
ranked in a minute. The features are those of the whole decoder pyramid, which every network has, a random one too.

Legend: N patches, (X, Y, Z) their size, C classes, F channels of the pyramid, R sampled voxels.
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
from mixcl_dist.networks.architectures import build_backbone, check_patches
from mixcl_dist.networks.backbone import Backbone
from mixcl_dist.networks.heads import voxels_of
from mixcl_dist.precision import autocast
from mixcl_dist.records import RUN, NetworkRecord, ProbeRecord, ProbeScans, ProbeScores
from mixcl_dist.seen import Seen, likeness, one_patient, shared_scans
from mixcl_dist.weights import load_weights

PATCHES_AT_ONCE = 4
VOXELS_OF_CLASS, VOXELS_OF_REST = 100, 400
"""Voxels sampled at most of each class in each patch, and of what is no class."""
FOREGROUND_WEIGHT = 5.0
"""Of a class's voxel, where one of the background has 1, as in fine-tuning: organs are a few percent of a patch."""
PENALTY = 1e-4
"""On the squared weights of the linear classifier of standardised features."""
ITERATIONS = 100
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

    def of(self, cases: np.ndarray, divisor: int) -> Patches:
        """Those of some scans, with edges cut off to multiples of `divisor`."""
        chosen = np.isin(self.case, cases)
        x, y, z = (edge // divisor * divisor for edge in self.hu.shape[1:])
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
    for patch, sample in zip(label, samples, strict=True):
        patch[...] = number_of[case_of_sample[sample]][patch]
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
    sample = _joined([_sample(fitted, *part) for part in _pyramids(backbone, fitted, window_hu)])
    mean, deviation = sample.features.mean(0), sample.features.std(0)
    if not torch.isfinite(mean).all() or (deviation > 1e-6).sum() < 2:
        cure = "pre-train with a lower --optimizer.learning_rate"
        raise RunError(f"the features are not finite, or alike at every voxel (the network has collapsed); {cure}")
    scale = 1 / deviation.clamp_min(1e-6)
    standard = sample.standardised(mean, scale)
    weight, bias = _fit_linear(standard)
    linear, queries = [], []
    for part in _pyramids(backbone, judged, window_hu):
        linear += _judge_linear(judged, *part, weight * scale, bias - (weight * scale) @ mean)
        queries.append(_sample(judged, *part))
    neighbours = _judge_neighbours(standard, _joined(queries).standardised(mean, scale), judged)
    return {"linear": np.array(linear), "knn": neighbours}


@dataclass(frozen=True)
class _Sample:
    """Voxels that stand for all of their scans."""

    features: Tensor
    """(R, F) float32."""
    label: Tensor
    """(R,) int64 in 0 … C."""
    weight: Tensor
    """(R,) float32: how many voxels each stands for."""
    patch: Tensor
    """(R,) int64."""
    known: Tensor
    """(R, C + 1) bool."""

    def standardised(self, mean: Tensor, scale: Tensor) -> _Sample:
        return _Sample((self.features - mean) * scale, self.label, self.weight, self.patch, self.known)

    def thinned(self, count: int) -> _Sample:
        step = -(-len(self.label) // count)
        return _Sample(*(t[::step] for t in (self.features, self.label, self.weight * step, self.patch, self.known)))


def _joined(samples: Sequence[_Sample]) -> _Sample:
    columns = ((s.features, s.label, s.weight, s.patch, s.known) for s in samples)
    return _Sample(*(torch.cat(column) for column in zip(*columns, strict=True)))


def _sample(patches: Patches, first: int, pyramid: list[Tensor]) -> _Sample:
    """Voxels of the patches from `first` on that the pyramid is of: the same share of every class in each, at most
    `VOXELS_OF_CLASS` or `VOXELS_OF_REST` of them."""
    parts = []
    for row in range(len(pyramid[0])):
        label = patches.label[first + row]
        chosen, weight = _choose(label, np.random.default_rng(first + row))
        position = np.stack(np.unravel_index(chosen, label.shape), axis=1)
        index = torch.from_numpy(np.insert(position, 0, row, axis=1)).to(pyramid[0].device)
        parts.append(
            _Sample(
                features=voxels_of(pyramid, index).float().cpu(),
                label=torch.from_numpy(label.ravel()[chosen].astype(np.int64)),
                weight=torch.from_numpy(weight),
                patch=torch.full((len(chosen),), first + row),
                known=torch.from_numpy(patches.known[first + row]).expand(len(chosen), -1),
            )
        )
    return _joined(parts)


def _choose(label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions of sampled voxels in the flat patch, and how many voxels each stands for, float32."""
    flat = label.ravel()
    chosen, weights = [], []
    for number in np.setdiff1d(flat, IGNORED):
        voxels = np.flatnonzero(flat == number)
        most = VOXELS_OF_CLASS if number else VOXELS_OF_REST
        taken = voxels if len(voxels) <= most else rng.choice(voxels, most, replace=False)
        chosen.append(taken)
        weights.append(np.full(len(taken), len(voxels) / len(taken), np.float32))
    return np.concatenate(chosen), np.concatenate(weights)


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


@torch.enable_grad()
def _fit_linear(sample: _Sample) -> tuple[Tensor, Tensor]:
    """(C + 1, F) weights and (C + 1,) biases of multinomial logistic regression, by L-BFGS.

    A background voxel may be of any class that is not known in its scan, so those probabilities are added up, as in
    `marginal_loss`.
    """
    weight = torch.zeros(sample.known.shape[1], sample.features.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    foreground = sample.label > 0
    importance = sample.weight * torch.where(foreground, FOREGROUND_WEIGHT, 1.0)
    importance = importance / importance.sum()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_probability = F.linear(sample.features, weight, bias).log_softmax(1)
        rest = log_probability.masked_fill(sample.known, -torch.inf).logsumexp(1)
        of_class = log_probability.gather(1, sample.label[:, None])[:, 0]
        value = -(importance * torch.where(foreground, of_class, rest)).sum() + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _judge_linear(
    patches: Patches, first: int, pyramid: list[Tensor], weight: Tensor, bias: Tensor
) -> list[np.ndarray]:
    """Of each patch (3, C + 1) voxels of each class that are found, drawn, and both."""
    levels = [pyramid[-1], *pyramid[:-1]]  # in the order of `voxels_of`
    columns = weight.to(pyramid[0].device).split([level.shape[1] for level in levels], dim=1)
    logits = bias.to(pyramid[0].device)[:, None, None, None]
    for features, of_level in zip(levels, columns, strict=True):
        coarse = torch.einsum("nfxyz,cf->ncxyz", features.float(), of_level)
        logits = logits + F.interpolate(coarse, pyramid[-1].shape[2:], mode="trilinear")
    found = logits.argmax(1).flatten(1).cpu().numpy()
    drawn = patches.label[first:].reshape(-1, found.shape[1])
    return [_count(one, other, np.ones(len(one)), len(weight)) for one, other in zip(found, drawn, strict=False)]


def _judge_neighbours(sample: _Sample, query: _Sample, patches: Patches) -> np.ndarray:
    """(N, 3, C + 1), as `_judge_linear`: the class that most of a voxel's nearest neighbours (by cosine) stand for."""
    sample, query = sample.thinned(NEIGHBOUR_VOXELS), query.thinned(NEIGHBOUR_VOXELS)
    importance = sample.weight * torch.where(sample.label > 0, FOREGROUND_WEIGHT, 1.0)
    ballots = F.one_hot(sample.label, sample.known.shape[1]) * importance[:, None]
    reference = F.normalize(sample.features, dim=1)
    found = []
    for part in F.normalize(query.features, dim=1).split(1024):
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
