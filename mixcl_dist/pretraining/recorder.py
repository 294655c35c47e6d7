"""What a pre-training run leaves for people: metrics, pictures, the network and the facts of its labels."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save

from mixcl_dist.cluster.engine import Engine
from mixcl_dist.config import Config
from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.streaming.stream import Batch
from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import write_atomic
from mixcl_dist.networks.architectures import build_backbone
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.precision import arithmetic
from mixcl_dist.pretraining.alarms import alarms
from mixcl_dist.pretraining.diagnostics import effective_rank
from mixcl_dist.pretraining.probe import Patches, probe, read_patches
from mixcl_dist.pretraining.views import Views
from mixcl_dist.records import NetworkRecord, PretrainRecord, ShardsRecord
from mixcl_dist.run import Run

PATCHES_SHOWN = 4
BACKBONE, WHOLE_NETWORK = "network.safetensors", "pretrain.safetensors"
LABEL_TERMS = ("voxel_label", "voxel_label_floor", "voxel_label_similarity")


class Recorder:
    """Rank 0 writes; the other ranks take part where the network itself must run."""

    def __init__(
        self,
        path: Path,
        config: Config,
        manifest: Manifest,
        training_cases: list[str],
        label_cases: list[str],
        engine: Engine,
        history: Mapping[str, Any],
    ):
        """`history` are facts of this run and those it started from, which the run records as they are."""
        self._path = path
        self._config = config
        self._manifest = manifest
        self._labels = bool(label_cases)
        self._engine = engine
        self.skipped = 0
        """Newest steps in a row whose gradient was not finite, by which nothing was learnt; the same on all ranks."""
        self._begin_interval()
        self._probed: dict[str, float] = {}
        self._probe_patches: tuple[Patches, tuple[str, ...]] | None = None
        self._run = None
        if engine.rank == 0:
            facts = PretrainRecord(
                name=path.name,
                finished=None,
                arithmetic=arithmetic(engine.device),
                world_size=engine.world_size,
                shards=_shards(manifest, set(training_cases)),
                datasets=dict(Counter(case.dataset for case in manifest.cases if case.name in set(training_cases))),
                withheld_cases=tuple(sorted({case.name for case in manifest.cases} - set(training_cases))),
                budget={key: getattr(config.budget, key) for key in ("fraction", "scans", "seed", "classes")},
                parameters=sum(parameter.numel() for parameter in engine.module.parameters()),
                **{"training_cases": tuple(training_cases), "label_cases": tuple(label_cases)} | dict(history),
            )
            self._run = Run.create(path, config, facts)
            if config.engine.zero_stage == 3 and config.pretrain.gradient_norms_every:
                self._run.warn(
                    "gradient_norms", "at ZeRO stage 3, which scatters the parameters, no term's gradient is measured"
                )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time of the block as this rank's own work, in which it waits for no other."""
        if self._engine.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.monotonic()
            yield
            self._computed += time.monotonic() - start

    def begin_again(self, config: Config, step: int) -> None:
        """Go on after `step` with other settings."""
        self._config, self.skipped = config, 0
        self._begin_interval()
        if self._run:
            self._run.change(config)
        self.forget_after(step)

    def forget_after(self, step: int) -> None:
        if self._run:
            self._run.forget_metrics_after(step)

    def add(self, loss: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Keep one backward pass's loss and terms, 0-d, for the means that `log` writes; nothing waits for them."""
        self._names = ["loss", *terms]
        self._passes.append(torch.stack([value.float() for value in (loss.detach(), *terms.values())]))

    def inspect(self, figures: Mapping[str, torch.Tensor]) -> None:
        """Keep what `diagnostics` measured of one backward pass, for the means that `log` writes."""
        for name, value in figures.items():
            self._inspected[name].append(value)

    def log(self, step: int) -> None:
        """Write the means since the last call, learning rate, speed; of passes whose loss is finite."""
        means = self._means()
        self.count_skipped()
        seconds = time.monotonic() - self._interval_start
        batch_size = self._config.pretrain.batch_size
        samples = len(self._passes) / self._config.engine.accumulation_steps * batch_size
        scalars = {name: round(mean, 6) for name, mean in means.items() if math.isfinite(mean)}
        scalars |= self._inspection() | self._global_gradient() | self._slowest_rank(seconds)
        scalars |= {
            "samples": step * batch_size,
            "learning_rate": self._engine.learning_rate(),
            "samples_per_s": round(samples / seconds, 3),
            "data_wait_share": round(self._waited / seconds, 4),
            "seconds": round(seconds, 3),
        }
        if self._run:
            self._run.log(step, **scalars, **self._probed)
            for kind, text in alarms(step, scalars, self._config, labels=self._labels).items():
                self._run.warn(kind, text)
        self._probed = {}
        self._begin_interval()

    def count_skipped(self) -> int:
        """Ask the engine for the gradients' norms since the last time, for the next log; returns `skipped`."""
        norms = self._engine.gradient_norms()
        for norm in norms:
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        self._norms += norms
        if self.skipped and self._run:
            self._run.warn(
                "skipped", "a step's gradient was not finite: it is left out; a lower optimizer.learning_rate may help"
            )
        return self.skipped

    def _means(self) -> dict[str, float]:
        """Of each term over the passes kept, NaN for one that none of them says anything of.

        A batch without labelled voxels says nothing of the label term, so that one is weighted by its anchors. Values
        that are not finite count nowhere.
        """
        passes = torch.stack(self._passes).double().cpu().numpy()
        values = dict(zip(self._names, passes.T, strict=True))
        means = {}
        for name, value in values.items():
            weight = values["voxel_label_anchors"] if name in LABEL_TERMS else np.ones_like(value)
            weight = np.where(np.isfinite(value), weight, 0)
            means[name] = float(np.average(value[weight > 0], weights=weight[weight > 0])) if weight.any() else math.nan
        return means

    def _inspection(self) -> dict[str, float]:
        """Means of what was kept by `inspect`, with five digits, as a term's gradient may be tiny."""
        means = {name: torch.stack(values).mean(0).cpu() for name, values in self._inspected.items()}
        moment = means.pop("second_moment", None)
        figures = {name: float(mean) for name, mean in means.items()}
        if moment is not None and moment.isfinite().all():
            figures["effective_rank"] = effective_rank(moment)
        return {name: float(f"{figure:.5g}") for name, figure in figures.items() if math.isfinite(figure)}

    def _global_gradient(self) -> dict[str, float]:
        """Mean norm of the gradient before clipping, the share of steps that were clipped, and how many left out."""
        norms, largest = np.array(self._norms), self._config.engine.gradient_clipping
        finite = norms[np.isfinite(norms)]
        skipped: dict[str, float] = {"skipped_steps": len(norms) - len(finite)} if len(finite) < len(norms) else {}
        if not len(finite):
            return skipped
        mean = skipped | {"gradient_norm": round(float(finite.mean()), 6)}
        return mean | ({"clipped_share": round(float((finite > largest).mean()), 4)} if largest else {})

    def _slowest_rank(self, seconds: float) -> dict[str, float]:
        """Which rank took longest for data and forward pass, where none waits for another, how long a step, and by what
        share of a step longer than the median rank."""
        if self._engine.world_size == 1:
            return {}
        computed = self._computed + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        steps = len(self._passes) / self._config.engine.accumulation_steps
        took = self._engine.gather([self._waited / steps, computed / steps])
        rank = max(range(len(took)), key=lambda rank: sum(took[rank]))
        usual = float(np.median([sum(own) for own in took]))
        excess = (sum(took[rank]) - usual) * steps / seconds
        figures = {"data_wait_s": took[rank][0], "forward_s": took[rank][1], "excess": excess}
        return {"slowest_rank": rank} | {f"slowest_rank_{name}": round(value, 4) for name, value in figures.items()}

    def _begin_interval(self) -> None:
        self._passes: list[torch.Tensor] = []
        self._norms: list[float] = []
        self._inspected: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._waited, self._computed, self._interval_start = 0.0, 0.0, time.monotonic()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def pictures(self, step: int, batch: Batch, views: Views) -> None:
        """Keep the middle slice of a few first views: clean, degraded, restored, embedding in colours, label."""
        image = views.image[: min(PATCHES_SHOWN, len(batch.label))]  # first views, one of each patch
        shown, (width, height, depth) = len(image), image.shape[2:]
        index = _slice_index(shown, width, height, depth // 2, image.device)
        self._engine.module.eval()
        # Images are fewer than a step's: what is compiled would be compiled anew for them, which takes minutes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = self._engine(image, index)
        self._engine.module.train()
        if not self._run:
            return
        middle = (slice(None, shown), 0, ..., depth // 2)
        arrays = {
            "step": np.array(step),
            "clean": views.clean[middle],
            "degraded": views.image[middle],
            "restored": output.reconstruction[middle],
            "mask": views.mask[middle],
            "embedding_rgb": _principal_colours(output.voxel).view(shown, width, height, 3),
            "label": _view_label(batch.label, views.patch_from_view[:shown], index, shown, width, height),
        }
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **{name: _compact(array) for name, array in arrays.items()})
        write_atomic(self._run.path / "samples.npz", file.getvalue())

    def probe(self, shards: Path | str) -> None:
        """Probe the network's features for the next log, and leave the figures in `probe.json`.

        Features of weights that give no finite gradient are not probed.
        """
        if self.count_skipped():
            return
        weights = self._weights(cast(PretrainNetwork, self._engine.module).backbone)
        if not self._run:
            return
        if self._probe_patches is None:
            self._probe_patches = read_patches(shards, self._config.budget.development)
        # A network of its own: at ZeRO stage 3 the engine's cannot run on one rank alone.
        backbone = build_backbone(self._config.network)
        backbone.load_state_dict(weights)
        try:
            found = probe(backbone.to(self._engine.device), *self._probe_patches, self._config.network.window_hu)
        except RunError as error:
            self._run.warn("probe", str(error))
            return
        means = {"probe_linear": found.linear.mean, "probe_knn": found.knn.mean}
        self._probed = {name: mean for name, mean in means.items() if mean is not None}
        dataclasses.replace(found, cases=self._config.budget.development).save(self._run.path)

    def _weights(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """In main memory; every rank has to call."""
        with self._engine.whole_parameters():
            return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}

    def finish(self) -> None:
        """Write the backbone, what it is and, to begin a pre-training with, all heads; mark the run as finished."""
        whole = self._weights(self._engine.module)
        if not self._run:
            return
        contents = {BACKBONE: save(backbone_of(whole)), WHOLE_NETWORK: save(whole)}
        for name, content in contents.items():
            write_atomic(self._path / name, content)
        shown = {"spacing_mm": self._manifest.spacing_mm, "classes": self._manifest.classes}
        NetworkRecord.of(self._config.network, contents, **shown).save(self._path)
        self._run.finish()


def backbone_of(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a whole network's weights the backbone's, by their names in it."""
    prefix = "backbone."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _shards(manifest: Manifest, trained: set[str]) -> ShardsRecord:
    return ShardsRecord(
        manifest_digest=manifest.digest,
        cases=len(manifest.cases),
        patches=manifest.patches,
        training_patches=sum(case.patches for case in manifest.cases if case.name in trained),
        classes=tuple(manifest.classes),
        spacing_mm=manifest.spacing_mm,
        patch_size=manifest.patch_size,
    )


def _slice_index(shown: int, width: int, height: int, z: int, device: torch.device) -> torch.Tensor:
    """(shown · width · height, 4) indices (view, x, y, z) of every voxel of one slice."""
    axes = [torch.arange(size, device=device) for size in (shown, width, height)]
    grid = torch.cartesian_prod(*axes)
    return torch.cat([grid, torch.full_like(grid[:, :1], z)], dim=1)


def _view_label(label, patch_from_view, index, shown: int, width: int, height: int) -> torch.Tensor:
    """The clean patch's label at every voxel of the slices, by the nearest voxel."""
    voxel = torch.cat([index[:, 1:].float(), torch.ones_like(index[:, :1], dtype=torch.float32)], dim=1)
    position = torch.einsum("nij,nj->ni", patch_from_view[index[:, 0]], voxel)[:, :3].round().long()
    limit = torch.tensor(label.shape[1:], device=position.device) - 1
    x, y, z = position.clamp_min(0).minimum(limit).unbind(1)
    seen = label.to(position.device)[index[:, 0], x, y, z].view(shown, width, height)
    return torch.where(seen == IGNORED, 0, seen)


def _principal_colours(embedding: torch.Tensor) -> torch.Tensor:
    """(N, D) embeddings → (N, 3) in [0, 1]: principal components, stretched between their 2nd and 98th percentiles."""
    embedding = embedding.float().nan_to_num(0.0, 0.0, 0.0)  # of diverged weights there are no components
    centred = embedding - embedding.mean(0)
    _, _, axes = torch.linalg.svd(centred.T @ centred)
    components = centred @ axes[:3].T
    low, high = torch.quantile(components[::7], torch.tensor([0.02, 0.98], device=components.device), dim=0)
    return ((components - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)


def _compact(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """In main memory, floating numbers as float16."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    return array.astype(np.float16) if array.dtype.kind == "f" else array
