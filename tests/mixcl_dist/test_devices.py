"""Both trainings on a GPU, as far as that can be told without one: no operator meets tensors of two devices."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from mixcl_dist.config import Config, replace
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.streaming.stream import PatchStream
from mixcl_dist.data_shards.volume import Volume
from mixcl_dist.finetuning import finetune
from mixcl_dist.finetuning.crops import LabelledVolume
from mixcl_dist.finetuning.scoring import segment
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.pretraining import pretrain
from mixcl_dist.pretraining.recorder import Recorder
from mixcl_dist.records import read_metrics

from .conftest import forget_constants
from .pretended_gpu import OnGpu, pretended_gpu


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch, "Generator", lambda device, cpu=torch.Generator: cpu())
    forget_constants()
    with pretended_gpu() as device:
        yield device
    forget_constants()


def test_the_device_refuses_what_a_gpu_refuses(gpu):
    there, here = torch.ones(3, device=gpu), torch.ones(3)
    assert (there + 1).cpu().tolist() == [2, 2, 2] and float(there.sum()) == 3
    with pytest.raises(RuntimeError, match="on the same device"):
        there + here
    with pytest.raises(RuntimeError, match="on the same device"):
        here[there.long()]
    with pytest.raises(TypeError, match="to numpy"):
        np.asarray(there)


class OneProcess:
    """As the engine of DeepSpeed is for one process, which brings a network to the device by itself."""

    rank, world_size, process_group, zero_stage = 0, 1, None, 0

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.module, self.device = module.to(device), device
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3, fused=True)
        self.norms: list[torch.Tensor] = []

    def __call__(self, *arguments):
        return self.module(*arguments)

    def step(self) -> None:
        self.norms.append(clip_grad_norm_(self.module.parameters(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient_norms(self) -> list[float]:
        norms, self.norms = self.norms, []
        return [float(norm) for norm in norms]

    def __getattr__(self, name: str):
        given = {"backward": torch.Tensor.backward, "any": bool, "learning_rate": lambda: 1e-3}
        return given.get(name, lambda *_: pretrain.nullcontext())


def test_pre_training_learns_logs_probes_and_shows_on_one_device(gpu, shards, small_config, tmp_path):
    development = [case.name for case in Manifest.load(shards).cases if case.reliable][:2]
    settings = {"pretrain.steps": 1, "pretrain.batch_size": 2, "pretrain.probe_every": 1, "budget.fraction": 0.5}
    config = replace(small_config, settings | {"budget.development": development})
    manifest = Manifest.load(shards)
    labelled = pretrain.budgeted_labels(manifest, config.budget)
    engine = OneProcess(PretrainNetwork(config.network), gpu)
    before = {name: weights.detach().cpu().clone() for name, weights in engine.module.named_parameters()}
    stream = PatchStream(shards, batch_size=2, seed=0, workers=0, label_cases=set(labelled))
    batches = (batch.to(gpu) for batch in stream)
    recorder = Recorder(tmp_path / "run", config, manifest, [], labelled, engine, {})
    saver = SimpleNamespace(failed=False, save=lambda step: None, wait=lambda: None)
    watch = pretrain.Watch(batches=lambda _: batches)
    pretrain._train(config, engine, stream, recorder, saver, 0, shards, lambda: False, watch)
    recorder.finish()
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {"loss", "gradient_norm_voxel_label", "effective_rank", "probe_linear", "probe_knn"} <= set(last)
    weights = dict(engine.module.named_parameters())
    assert all(isinstance(tensor, OnGpu) for tensor in weights.values())
    assert any(not torch.equal(weights[name].cpu(), before[name]) for name in before)


@pytest.mark.filterwarnings("ignore:.* copying from a non-meta parameter")  # it is none, and is copied to
def test_fine_tuning_fits_learns_is_kept_and_segments_on_one_device(gpu, tmp_path):
    small = {"network.filters": [4, 6, 8], "finetune.patch_size": [16, 16, 16], "finetune.batch_size": 1}
    config = replace(Config(), small | {"finetune.steps": 2, "finetune.curve_every": 1, "finetune.log_every": 1})
    target = np.zeros((20, 20, 20), np.uint8)
    target[4:10, 4:10, 4:10], target[12:18, 4:10, 8:16] = 1, 2
    hu = (100 * target).astype(np.int16)
    volumes = [LabelledVolume(hu, target, np.array([False, True, True]))]
    logged, told = [], []
    run = SimpleNamespace(
        path=tmp_path, forget_metrics_after=lambda step: None, log=lambda step, **figures: logged.append(figures)
    )

    def learn(steps: int) -> torch.nn.Module:
        network = SegmentationNetwork(config.network, 2).to(gpu)
        longer, nothing = replace(config, {"finetune.steps": steps}), lambda *_: None
        how = {"resume": True, "report": lambda step, dice: told.append(step)}
        return finetune._train(network, longer, volumes, run, nothing, gpu, **how)

    learn(1)
    learnt = learn(2)
    assert told == [1, 2] and len(logged) == 2
    assert all(isinstance(tensor, OnGpu) for tensor in learnt.parameters())
    how = {"spacing_mm": None, "window_hu": (-1000, 1000), "patch_size": (16, 16, 16), "overlap": 0.25, "device": gpu}
    found = segment(learnt, Volume(hu, np.eye(4)), **how)
    assert isinstance(found, np.ndarray) and found.shape == hu.shape
