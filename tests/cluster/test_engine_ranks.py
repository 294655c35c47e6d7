"""What some ranks saved at some ZeRO stage any others take up, and ranks that do not fit together are told so."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from .ranks import finish, start

PROGRAM = """
import functools, os, sys
from pathlib import Path
import torch
from torch.optim.lr_scheduler import LambdaLR
from mixcl_dist.cluster.engine import EngineConfig, launch

folder, sources, stages = Path(sys.argv[1]), sys.argv[2].split(","), [int(stage) for stage in sys.argv[3].split(",")]
optimizer = functools.partial(torch.optim.AdamW, lr=0.02, fused=True)
schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])


def module(seed):
    torch.manual_seed(seed)  # 37 and 11 are no multiple of any number of ranks
    return torch.nn.Sequential(torch.nn.Linear(6, 37), torch.nn.GELU(), torch.nn.Linear(37, 11), torch.nn.Linear(11, 1))


def train(engine, first, last):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 6, generator=generator) for _ in range(last)]
    for x in batches[first:]:
        engine.backward(engine(x[rank * 4 // world : (rank + 1) * 4 // world]).square().mean())
        engine.step()


def launched(stage, seed):
    return launch(module(seed), optimizer, schedule, micro_batch_size=4 // world, config=EngineConfig(zero_stage=stage))


def saved(engine, name):
    path = folder / name
    path.mkdir(exist_ok=True)
    snapshot = engine.snapshot()
    if rank == 0:
        snapshot.write(path)
    engine.barrier()


for source, stage in [(source, stage) for source in sources for stage in stages]:
    engine = launched(stage, seed=0 if source == "none" else 9)
    name = f"{world}-{stage}"
    if source == "none":
        train(engine, 0, 3)
        saved(engine, name)
    else:
        engine.load(folder / source)
        name = f"{source}-to-{name}"
        saved(engine, name)
    train(engine, 3, 6)
    saved(engine, name + "-end")
    if source == "none":
        continue
engine.close()
"""


def run(tmp_path, ranks, sources, stages):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for code, _, errors in finish(start([program, tmp_path, ",".join(sources), ",".join(map(str, stages))], ranks)):
        assert code == 0, errors


def state(tmp_path, name):
    return load_file(tmp_path / name / "engine.safetensors")


def check_resumed(tmp_path, source, name):
    """Taking it up loses no bit, and what is learnt then is what the one that was not stopped learnt."""
    for tensor, expected in state(tmp_path, source).items():
        torch.testing.assert_close(state(tmp_path, f"{source}-to-{name}")[tensor], expected, rtol=0, atol=0)
    exact = source == name and name[0] in "12"  # more than two are added up in the order in which they come
    ended, resumed = state(tmp_path, f"{source}-end"), state(tmp_path, f"{source}-to-{name}-end")
    for tensor, expected in ended.items():
        rtol, atol = (0, 0) if exact else (1e-4, 1e-6)
        torch.testing.assert_close(resumed[tensor], expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.slow
def test_two_ranks_are_gone_on_with_by_one(tmp_path):
    run(tmp_path, 2, ["none"], [3])
    run(tmp_path, 1, ["2-3"], [0, 1])
    for stage in (0, 1):
        check_resumed(tmp_path, "2-3", f"1-{stage}")


@pytest.mark.slow
def test_any_ranks_at_any_stage_go_on_with_what_any_others_saved(tmp_path):
    stages = (0, 1, 2, 3)
    for ranks in (1, 2, 4):
        run(tmp_path, ranks, ["none"], stages)
    sources = [f"{ranks}-{stage}" for ranks, stage in itertools.product((1, 2, 4), stages)]
    for ranks in (1, 2, 4):
        run(tmp_path, ranks, sources, stages)
    for source, ranks, stage in itertools.product(sources, (1, 2, 4), stages):
        check_resumed(tmp_path, source, f"{ranks}-{stage}")


APART = """
import functools, os, sys, time
import torch
from torch.optim.lr_scheduler import LambdaLR
from mixcl_dist.cluster.engine import EngineConfig, EngineError, launch

rank, what = int(os.environ["RANK"]), sys.argv[1]
if what == "missing" and rank == 1:
    sys.exit(3)
common = {"rate": 1 + (rank if what == "settings" else 0), "code": "a"}
try:
    engine = launch(
        torch.nn.Linear(6, 1),
        functools.partial(torch.optim.AdamW, lr=0.02),
        functools.partial(LambdaLR, lr_lambda=lambda step: 1.0),
        micro_batch_size=2,
        config=EngineConfig(zero_stage=1, timeout_s=5),
        common=common,
    )
    print("flags", engine.any(rank == 1), engine.any(False), engine.gather({"rank": rank}), flush=True)
    with engine.together():
        for step in range(1000):
            if step == 3 and rank == 1 and what != "settings":
                print("last", flush=True)
                os._exit(3) if what == "dead" else time.sleep(600)
            engine.backward(engine(torch.ones(2, 6)).square().mean())
            engine.step()
except EngineError as error:
    print(error, file=sys.stderr)
    os._exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("settings", "ranks 0 and 1 differ in rate (1 and 2); start all ranks with the same command"),
        ("missing", "another rank did not answer within engine.timeout_s, 5 s"),
        ("dead", "another rank has ended; see what it says, then start all ranks again"),
        ("hung", "another rank did not answer within engine.timeout_s, 5 s"),
    ],
)
def test_a_rank_that_is_missing_or_different_ends_the_others_with_one_line(tmp_path, what, said):
    program = tmp_path / "program.py"
    program.write_text(APART)
    processes = start([program, what], 2)
    try:
        output, errors = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 2, errors
    assert said in errors.strip().splitlines()[-1], errors
    if what in ("dead", "hung"):
        assert "flags True False [{'rank': 0}, {'rank': 1}]" in output
