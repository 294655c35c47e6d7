"""Pre-training: patches → two views → features → three consistencies → step. Read `pretrain` from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.autograd.profiler import record_function
from torch.optim.lr_scheduler import LambdaLR

from mixcl_dist.budget import budget_cases, check_development, readable, training_cases
from mixcl_dist.cluster import checkpoint
from mixcl_dist.cluster.engine import Engine, launch
from mixcl_dist.cluster.group import described, told_by_first
from mixcl_dist.cluster.installation import code_digest
from mixcl_dist.cluster.stopping import stop_requests
from mixcl_dist.config import PRETRAINING, Config, ConfigError, differences, from_dict, replace, to_dict
from mixcl_dist.data_shards.building.dedup import scans_of_shards
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.streaming.stream import Batch, Mixture, PatchStream, StreamError
from mixcl_dist.errors import RunError
from mixcl_dist.networks.architectures import check_size
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.precision import arithmetic
from mixcl_dist.pretraining.diagnostics import gradient_norms, spread
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.pretraining.objective import mixcl_loss
from mixcl_dist.pretraining.recorder import WHOLE_NETWORK, Recorder
from mixcl_dist.pretraining.rows import sample_rows
from mixcl_dist.pretraining.saving import Saver
from mixcl_dist.pretraining.views import make_views
from mixcl_dist.progress import progress
from mixcl_dist.records import ANEW, NetworkRecord, PretrainRecord, RunPlan
from mixcl_dist.run import LOCK, Stopped, held, is_barely_begun, read_config
from mixcl_dist.schedule import warmup_cosine
from mixcl_dist.seen import FILE as SEEN_FILE
from mixcl_dist.seen import Seen
from mixcl_dist.settings import BudgetConfig
from mixcl_dist.trackers import check_trackers
from mixcl_dist.weights import load_weights

FREE_ON_RESUME = (
    "checkpoint.", "pretrain.log_every", "pretrain.sample_every", "pretrain.probe_every",
    "pretrain.gradient_norms_every", "pretrain.max_hours", "pretrain.max_skipped", "pretrain.rewind_factor",
    "pretrain.trackers", "engine.accumulation_steps", "engine.activation_checkpointing", "engine.bucket_size",
    "engine.compile", "engine.offload_optimizer", "engine.timeout_s", "engine.zero_stage", "data.workers",
    "data.max_bad_fraction", "data.cache", "optimizer.learning_rate",
)  # fmt: skip
"""Settings that may change when a run goes on: they do not change what is learnt, but for the rate, which may have been
too high for the run to go on at all."""
FREE_OF_PLANS = (
    "optimizer.", "pretrain.steps", "pretrain.seed", "pretrain.max_", "pretrain.rewind_factor", "checkpoint.keep",
    "pretrain.trackers", "engine.timeout_s", "data.max_bad_fraction",
)  # fmt: skip
"""Settings that decide nothing of what a step takes."""
OF_A_MACHINE = ("data.workers", "data.cache")
"""Settings in which the ranks of a run may differ."""
MAX_REWINDS = 3
"""In one start: what diverges again and again is not mended by the rate alone."""
SHARED_TRIES = 6
"""Looks at a run's folder, over eight seconds, before it is said not to be shared."""


class Diverged(RunError):
    """No gradient has been finite for `pretrain.max_skipped` steps, on all ranks alike."""

    def __init__(self, line: str, *, can_go_on: bool = False) -> None:
        super().__init__(line)
        self.can_go_on = can_go_on


@dataclass(frozen=True)
class Watch:
    """What a profiler has in a run."""

    part: Callable[[str], AbstractContextManager] = record_function
    """A block around each part of a step, named, and around the "step"; as it is, a range for torch.profiler."""
    batches: Callable[[Iterable[Batch]], Iterator[Batch]] = iter
    """What the steps take their batches from, of the stream."""


def pretrain(
    config: Config,
    *,
    shards: Path | str,
    run: Path,
    start: Path | None = None,
    resume: bool = False,
    plan: RunPlan | None = None,
    watch: Watch = Watch(),
) -> None:
    """Pre-train a network on the patches in `shards` and leave everything in the folder `run`.

    It begins with the network of `start`, a finished pre-training run, heads included, or (None) with random weights;
    what the start has seen counts as seen by this run, too.
    `shards` is a folder or a URL. Labels are read only of the cases in the budget (`config.budget`); the run records
    who they are. With `resume` the newest whole checkpoint in `run` is continued exactly: same samples, same views.
    The run records what a `plan` for it says, so that its report can tell what came of that.
    Between two logs nothing in a step waits for a GPU.
    Raises `RunError`, `ConfigError`, `EngineError`, `CheckpointError` or the stream's errors, each one line with the
    cure (`ToldError` on a rank that leaves it to rank 0), and `Stopped` where SIGTERM or SIGUSR1 came or
    `pretrain.max_hours` are over: the step was finished, and all is saved.
    """
    first_rank = described().rank == 0
    most_s = 3600 * (config.pretrain.max_hours or math.inf)
    with held(run, "--run") if first_rank else nullcontext(), stop_requests(most_s) as requested:
        _pretrain(config, shards, run, start, resume, plan, requested, watch)


def _pretrain(
    config: Config,
    shards: Path | str,
    run: Path,
    start: Path | None,
    resume: bool,
    plan: RunPlan | None,
    stop_requested: Callable[[], bool],
    watch: Watch,
) -> None:
    manifest = Manifest.load(shards)
    resume = resume and not is_barely_begun(run)  # killed before there was anything to go on with
    check_settings(config, manifest)
    _check_folder(config, manifest, run, resume)
    start = recorded_start(run, start) if resume else start
    plan = plan or (PretrainRecord.load(run).plan if resume else None)
    if plan is not None:
        _check_plan(plan, config, manifest)
    label_cases = budgeted_labels(manifest, config.budget)
    seen, history = _history(config, shards, manifest, label_cases, run, start)
    torch.manual_seed(config.pretrain.seed)
    torch.backends.cudnn.benchmark = True  # shapes are the same in every step
    network = PretrainNetwork(config.network)
    network.backbone.recomputes = config.engine.activation_checkpointing
    if start is not None and not (resume and checkpoint.newest(run / "checkpoints")):
        _load_start(network, config, start)
    engine = _launch(network, config, _common(config, manifest, seen, resume), run / "stacks")
    with engine.together():
        _check_shared(run, engine)
        stream = _stream(config, shards, run, manifest, label_cases, engine)
        with Saver(run, config.checkpoint, engine, stream) as saver:
            first = saver.resume() if resume else 0
            trained = training_cases(manifest.cases, config.budget)
            facts = history | {"plan": plan}
            recorder = Recorder(run, config, manifest, trained, label_cases, engine, facts)
            recorder.forget_after(first)
            if engine.rank == 0:
                seen.save(run)
                _say(f"{_lesson(config, label_cases)}; {arithmetic(engine.device)} on {engine.device.type}")
            for rewinds_left in reversed(range(1 + (MAX_REWINDS if config.pretrain.rewind_factor else 0))):
                try:
                    _train(config, engine, stream, recorder, saver, first, shards, stop_requested, watch)
                    break
                except Diverged as diverged:
                    if not (rewinds_left and diverged.can_go_on):
                        raise told_by_first(diverged, engine.rank) from None
                    config, first = _rewind(config, engine, recorder, saver)
        recorder.finish()
    engine.close()


def _train(
    config: Config,
    engine: Engine,
    stream: PatchStream,
    recorder: Recorder,
    saver: Saver,
    first: int,
    shards: Path | str,
    stop_requested: Callable[[], bool],
    watch: Watch,
) -> None:
    """Take the steps after `first`, and save the last one."""
    group = engine.process_group if config.objective.contrast == "global" else None
    batches, part = watch.batches(stream), watch.part
    network = cast(PretrainNetwork, engine.module).train()
    for step in _steps(first, config, engine, watch):
        is_due = functools.partial(_is_due, step, last=step == config.pretrain.steps)
        inspected = is_due(config.pretrain.gradient_norms_every)
        engine.doing(f"step {step}")
        for _ in range(config.engine.accumulation_steps):
            with recorder.waiting(), part("wait"):
                batch = next(batches)
            with part("views"):
                draws = Draws(config.pretrain.seed, batch.slots, engine.device)
                views = make_views(batch.image, batch.spacing, config.views, config.network.window_hu, draws)
            with part("rows"):
                where, size = views.patch_from_view, config.views.size
                rows = sample_rows(where, size, batch.label, batch.candidate_bits, config.rows, draws, group)
            if inspected and config.engine.zero_stage != 3:
                with part("inspection"):
                    recorder.inspect(gradient_norms(network, views, rows, config.objective, group))
            with recorder.computing(), part("forward"):
                output = engine(views.image, rows.voxel_index)
            if inspected:
                recorder.inspect(spread(output.voxel, rows.present))
            with part("loss"):
                loss, terms = mixcl_loss(output, views, rows, config.objective, group)
            with part("backward"):
                engine.backward(loss)
            with part("optimizer"):
                engine.step()
            recorder.add(loss, terms)
        ends = engine.any(stop_requested() or saver.failed)
        if is_due(config.pretrain.probe_every):
            recorder.probe(shards)
        if ends or is_due(config.pretrain.log_every):
            _share_bad_samples(stream, engine)
            recorder.log(step)
        if (ends or is_due(config.checkpoint.every)) and not recorder.count_skipped():
            with part("checkpoint"):
                saver.save(step)  # but for weights that may have diverged
        if recorder.skipped >= config.pretrain.max_skipped:
            raise _diverged(step, recorder.skipped, saver)
        if is_due(config.pretrain.sample_every):
            with part("pictures"):
                recorder.pictures(step, batch, views)
        if ends and step < config.pretrain.steps:
            saver.wait()
            raise Stopped(f"{saver.run}: stopped as asked, and saved at step {step}; go on with --resume latest")
    saver.wait()


def _steps(first: int, config: Config, engine: Engine, watch: Watch) -> Iterator[int]:
    steps: Iterable[int] = range(first + 1, config.pretrain.steps + 1)
    if engine.rank == 0:
        steps = progress(steps, total=config.pretrain.steps, initial=first, desc="pretrain", unit="step")
    for step in steps:
        with watch.part("step"):
            yield step


def _lesson(config: Config, label_cases: Sequence[str]) -> str:
    """What is learned from, in one line."""
    terms = ", ".join(learnt_terms(config, label_cases))
    if config.objective.voxel_label and not label_cases:
        return f"learns from {terms}; no labels, as the budget is empty (see --budget.scans)"
    count = len(label_cases) if config.objective.voxel_label else 0
    return f"learns from {terms}; labels of {count} case{'' if count == 1 else 's'}"


def _is_due(step: int, every: int, last: bool) -> bool:
    """Whether something done every so many steps, and after the last one, is done at `step`; 0 is never."""
    return every > 0 and (last or step % every == 0)


def budgeted_labels(manifest: Manifest, budget: BudgetConfig) -> list[str]:
    """Names of the cases whose pixel labels pre-training may read, dataset by dataset (see `budget_cases`)."""
    unknown = set(budget.full_datasets) - {case.dataset for case in manifest.cases}
    if unknown:
        known = ", ".join(sorted({case.dataset for case in manifest.cases}))
        raise ConfigError(
            f"budget.full_datasets: {', '.join(sorted(unknown))} is not in the shards; choose among {known}"
        )
    whole = dataclasses.replace(budget, fraction=1.0, scans=None)
    names: list[str] = []
    for dataset in sorted({case.dataset for case in manifest.cases}):
        cases = [case for case in manifest.cases if case.dataset == dataset]
        names += budget_cases(cases, whole if dataset in budget.full_datasets else budget)
    return names


def check_sizes(config: Config, patch_size: Sequence[int]) -> None:
    """Raise `ConfigError` where the views do not suit the network or the patches, or the batch its processes."""
    check_size("views.size", config.network, config.views.size)
    if any(view > patch for view, patch in zip(config.views.size, patch_size, strict=True)):
        size, most = (",".join(map(str, edges)) for edges in (config.views.size, patch_size))
        cure = f"give at most that, or build shards with a larger --build.patch_size than {most}"
        raise ConfigError(f"views.size {size} is larger than the shards' patches of {most}; {cure}")
    micro_batch_size(config, described().world_size)


def check_settings(config: Config, manifest: Manifest) -> None:
    """Raise `ConfigError` for what cannot be pre-trained on these shards, before anything is made."""
    check_trackers(config.pretrain.trackers)
    check_sizes(config, manifest.patch_size)
    check_development(manifest.cases, config.budget.development)
    if config.pretrain.probe_every and len(config.budget.development) < 2:
        raise ConfigError("pretrain.probe_every: there are no two scans in budget.development to probe on; name some")
    for name in config.budget.classes or ():
        if name not in manifest.classes:
            known = ", ".join(manifest.classes)
            raise ConfigError(f"budget.classes: {name} is none of the shards' classes; choose among {known}")
    if not training_cases(manifest.cases, config.budget):
        raise ConfigError("the shards hold no training case; build them with --build.splits training,unlabelled")
    if not learnt_terms(config, budgeted_labels(manifest, config.budget)):
        raise ConfigError("objective: voxel_label alone has a weight, but no labels may be read; give --budget.scans")


def learnt_terms(config: Config, label_cases: Sequence[str]) -> list[str]:
    """The terms of the objective that something is learned from: with a weight and, for labels, with cases."""
    return [term for term in config.objective.single_terms() if term != "voxel_label" or label_cases]


def _check_folder(config: Config, manifest: Manifest, run: Path, resume: bool) -> None:
    started = (run / "run.json").exists()
    if started and not resume:
        raise RunError(f"{run}: a run is there already; go on with --resume latest, or give another --run")
    if resume:
        if not started:
            raise RunError(f"{run}: no run to resume; leave out --resume")
        begun_on = PretrainRecord.load(run).shards
        if begun_on is None or begun_on.manifest_digest != manifest.digest:
            raise RunError(f"{run}: was begun on other shards; give those as --data, or start anew with another --run")
        changed = [key for key in differences(read_config(run), config) if not key.startswith(FREE_ON_RESUME)]
        if changed:
            raise RunError(
                f"{run}: {', '.join(changed)} differs from the run's config.yaml; leave it out, or start anew"
            )


def _check_plan(plan: RunPlan, config: Config, manifest: Manifest) -> None:
    """Raise `RunError` where what a plan says is not of this run."""
    here, problem = described(), ""
    changed = differences(from_dict({**to_dict(config), **plan.config}), config)
    if plan.shards != manifest.digest:
        problem = "of other shards"
    elif plan.gpus != here.world_size:
        problem = f"of {plan.gpus} GPUs or processes, and these are {here.world_size}"
    elif changed := [key for key in changed if not key.startswith(FREE_OF_PLANS)]:
        problem = f"of another {', '.join(changed)}"
    if problem:
        cure = "leave out --plan, or plan again with mixcl plan"
        raise told_by_first(RunError(f"--plan: is {problem}; {cure}"), here.rank)


def recorded_start(run: Path, start: Path | None) -> Path | None:
    """What the run in the folder `run` began from; raises `RunError` where `start` is something else."""
    recorded = PretrainRecord.load(run).start
    if start is not None and str(start.resolve()) != recorded:
        raise RunError(f"{run}: began from {recorded or 'random weights'} and goes on with that; leave out --start")
    return None if recorded is None else Path(recorded)


def _history(
    config: Config, shards: Path | str, manifest: Manifest, label_cases: list[str], run: Path, start: Path | None
) -> tuple[Seen, dict[str, Any]]:
    """What this run and those before it have seen, by voxels and by name, and what it began from."""
    reads, trained = set(label_cases), set(training_cases(manifest.cases, config.budget))
    records = zip(manifest.cases, scans_of_shards(shards), strict=True)
    scans = [(scan, readable(case, config.budget)) for case, scan in records if case.name in trained]
    seen = Seen(
        tuple(scan for scan, _ in scans),
        tuple(classes if scan.name in reads else frozenset() for scan, classes in scans),
    )
    earlier = run if (run / SEEN_FILE).exists() else start  # a run that goes on has the start's in its own
    if earlier is not None:
        seen = seen.merged(Seen.load(earlier))
    names = {  # of scans, which may share one
        "training_cases": tuple(scan.name for scan in seen.scans),
        "label_cases": tuple(scan.name for scan, classes in zip(seen.scans, seen.labels, strict=True) if classes),
    }
    terms = tuple(learnt_terms(config, label_cases))
    return seen, names | {"start": start and str(start.resolve()), "terms": terms}


def _load_start(network: PretrainNetwork, config: Config, start: Path) -> None:
    """Begin with the network that a finished pre-training run left in `start`; raises `RunError`."""
    if (record := PretrainRecord.load(start)).finished is None:
        raise RunError(f"{start}: has not finished; {record.how_to_finish}, or give another --start")
    theirs, ours = read_config(start).network, config.network
    fields = [field.name for field in dataclasses.fields(ours)]
    if changed := [f"network.{name}" for name in fields if getattr(theirs, name) != getattr(ours, name)]:
        raise RunError(f"{start}: differs in {', '.join(changed)}; give the same settings, or another --start")
    NetworkRecord.load(start).check(start / WHOLE_NETWORK)
    load_weights(network, start / WHOLE_NETWORK, problem="cannot be begun from", cure=ANEW)


def micro_batch_size(config: Config, ranks: int) -> int:
    """Patches of one of `ranks` ranks in one backward pass; raises `ConfigError` where they are not whole."""
    batch, parts = config.pretrain.batch_size, ranks * config.engine.accumulation_steps
    if batch % parts:
        problem = (
            f"pretrain.batch_size {batch} is that of all ranks, and not a multiple of {ranks} ranks × "
            f"{config.engine.accumulation_steps} accumulation steps; give e.g. {parts * max(1, batch // parts)}"
        )
        raise told_by_first(ConfigError(problem), described().rank)
    return batch // parts


def _stream(
    config: Config, shards: Path | str, run: Path, manifest: Manifest, label_cases: list[str], engine: Engine
) -> PatchStream:
    return PatchStream(
        shards,
        **_selection(config, manifest, label_cases),
        workers=config.data.workers,
        rank=engine.rank,
        world_size=engine.world_size,
        accumulation_steps=config.engine.accumulation_steps,
        device=engine.device,
        cache=config.data.cache,
        quarantine=run / "quarantine.jsonl",
        max_bad_fraction=config.data.max_bad_fraction,
    )


def check_batches(config: Config, shards: Path, manifest: Manifest) -> None:
    """Raise `ConfigError` where these shards do not fill batches of the wanted labelled and other patches."""
    try:
        PatchStream(shards, **_selection(config, manifest, budgeted_labels(manifest, config.budget)), workers=0)
    except StreamError as refused:
        raise ConfigError(str(refused)) from None


def _selection(config: Config, manifest: Manifest, label_cases: list[str]) -> dict[str, Any]:
    """What the stream shows, and in which order: the same in every process."""
    return {
        "batch_size": config.pretrain.batch_size,
        "seed": config.pretrain.seed,
        "cases": set(training_cases(manifest.cases, config.budget)),
        "label_cases": set(label_cases),
        "label_classes": config.budget.classes,
        "mixture": Mixture(config.data.labelled_fraction, config.data.class_aware, config.data.upsampling),
    }


def _common(config: Config, manifest: Manifest, seen: Seen, resume: bool) -> dict[str, Any]:
    """All in which the ranks of a run must be alike, in short texts that may be shown."""
    tree = to_dict(config)
    settings = {f"{section}.{key}": str(value) for section in PRETRAINING for key, value in tree[section].items()}
    for name in OF_A_MACHINE:
        del settings[name]
    scans = sorted(
        (scan.name, scan.digest, sorted(labels)) for scan, labels in zip(seen.scans, seen.labels, strict=True)
    )
    return settings | {
        "the code": code_digest(),
        "the version of torch": torch.__version__,
        "the shards (--data)": manifest.digest,
        "what was seen (--start)": hashlib.sha256(json.dumps(scans).encode()).hexdigest()[:16],
        "--resume": str(resume),
    }


def _check_shared(run: Path, engine: Engine) -> None:
    """Raise `RunError` on every rank where one sees another folder than that in which rank 0 holds its lock."""
    for attempt in range(SHARED_TRIES):
        lock = run / LOCK
        first, *others = engine.gather(lock.read_text() if lock.exists() else None)
        apart = [rank for rank, content in enumerate(others, 1) if content != first]
        if not apart:
            return
        time.sleep(attempt / 2)  # a network file system may show it a little later
    problem = f"{run}: ranks 0 and {apart[0]} see different folders; give a --run that all machines share"
    raise told_by_first(RunError(problem), engine.rank)


def _share_bad_samples(stream: PatchStream, engine: Engine) -> None:
    """What one rank may tolerate, all of them together may."""
    if engine.any(bool(stream.bad_samples)):
        stream.also_bad(sample for samples in engine.gather(stream.bad_samples) for sample in samples)


def _diverged(step: int, skipped: int, saver: Saver) -> Diverged:
    """How the run may go on: without checkpoints of the weights that gave no finite gradient."""
    newest = saver.set_aside(step - skipped)
    what = f"{saver.run}: no gradient has been finite from step {step - skipped + 1} to {step}"
    if newest is None:
        return Diverged(
            f"{what}, and there is no earlier checkpoint; start anew with a lower --optimizer.learning_rate"
        )
    how = f"lower --optimizer.learning_rate, with --resume latest, which goes on from {newest}"
    return Diverged(f"{what}; {how}", can_go_on=True)


def _rewind(config: Config, engine: Engine, recorder: Recorder, saver: Saver) -> tuple[Config, int]:
    """Go back to the newest checkpoint with a lower rate, which `config.yaml` keeps; returns settings and step."""
    assert config.pretrain.rewind_factor
    rate = config.optimizer.learning_rate * config.pretrain.rewind_factor
    engine.scale_rate(config.pretrain.rewind_factor)
    first = saver.resume()
    config = replace(config, {"optimizer.learning_rate": rate})
    recorder.begin_again(config, first)
    if engine.rank == 0:
        _say(f"no gradient was finite; goes on from step {first} with optimizer.learning_rate {rate:g}")
    return config, first


def _launch(network: PretrainNetwork, config: Config, common: dict[str, Any], stacks: Path) -> Engine:
    optimizer = functools.partial(
        torch.optim.AdamW,
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    schedule = warmup_cosine(config.pretrain.steps, config.optimizer.warmup_fraction, config.optimizer.final_fraction)
    return launch(
        network,
        optimizer,
        functools.partial(LambdaLR, lr_lambda=schedule),
        micro_batch_size=micro_batch_size(config, described().world_size),
        config=config.engine,
        common=common,
        stacks=stacks,
    )


def _say(line: str) -> None:
    print(f"pretrain: {line}", file=sys.stderr)
