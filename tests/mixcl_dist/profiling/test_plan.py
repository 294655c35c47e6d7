"""What a plan says follows from what was measured, by hand; and a run that is given one tells what came of it."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys

import pytest

from mixcl_dist import cli
from mixcl_dist.config import ConfigError, replace
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.errors import RunError
from mixcl_dist.pretraining.pretrain import pretrain
from mixcl_dist.profiling import plan
from mixcl_dist.profiling.plan import Cluster, Measured
from mixcl_dist.records import PretrainRecord, RunPlan

ALONE = {"loss_alone": 0.01, "loss_together": 0.01, "gather": 1e-5, "reduce": 1e-5, "gather_number": 1e-5}
TOGETHER = {"loss_alone": 0.01, "loss_together": 0.03, "gather": 0.002, "reduce": 0.003, "gather_number": 0.001}
FOUND = Measured(
    ranks=1,
    step_s=(0.1,) * 10,
    wait_s=0.0,
    now_and_then_s={},
    exchange_s=ALONE,
    parameters=1_000_000,
    checkpoint_bytes=12e6,
    peak_bytes=1e9,
    read_rate=1e9,
)
SMALL = "--network.filters 4,6,8 --views.size 16,16,16 --rows.per_view_pair 32 --pretrain.batch_size 4 --data.workers 0"


@pytest.fixture(scope="module")
def manifest(shards):
    return Manifest.load(shards)


@pytest.fixture
def predicted(small_config, manifest):
    def predict(cluster=Cluster(1, 1, 100), hours=1.0, settings=None, **found):  # noqa: B008, it is frozen
        config = replace(small_config, {"pretrain.batch_size": 16} | (settings or {}))
        return plan.predicted(config, manifest, cluster, dataclasses.replace(FOUND, **found), hours)

    return predict


def test_one_rank_does_what_it_did(predicted, manifest):
    found = predicted(hours=2)
    assert found.step_s.expected == pytest.approx(0.1)
    assert found.steps.expected == pytest.approx(72_000) and found.samples.expected == pytest.approx(16 * 72_000)
    trained = sum(case.patches for case in manifest.cases if case.split != "validation")
    assert found.epochs.expected == pytest.approx(16 * 72_000 / trained)
    assert found.gpu_hours == 2 and found.exchange_bytes_per_s == 0
    stored = sum(shard.bytes for shard in manifest.shards) / manifest.patches
    assert found.read_bytes_per_s == pytest.approx(160 * stored)
    assert found.asked_hours.expected == pytest.approx(1000 * 0.1 / 3600)


def test_what_is_done_now_and_then_takes_its_share(predicted):
    found = predicted(
        settings={"checkpoint.every": 10, "pretrain.gradient_norms_every": 5, "pretrain.sample_every": 100},
        now_and_then_s={"checkpoint": 1.0, "inspection": 0.2, "pictures": 2.0},
    )
    assert found.step_s.expected == pytest.approx(0.1 + 0.1 + 0.04 + 0.02)
    never = predicted(settings={"pretrain.gradient_norms_every": 0}, now_and_then_s={"inspection": 0.2})
    assert never.step_s.expected == pytest.approx(0.1)


def test_the_range_is_that_of_fifths(predicted):
    found = predicted(step_s=(0.1,) * 8 + (0.2,) * 2)
    assert found.step_s.expected == pytest.approx(0.12)
    assert (found.step_s.low, found.step_s.high) == pytest.approx((0.1, 0.2))
    assert found.steps.low == pytest.approx(18_000) and found.steps.high == pytest.approx(36_000)
    assert plan.spread_of_fifths([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_measured_ranks_pay_for_what_they_exchange(predicted):
    """8 patches of a rank, 2 views and 32 points are 512 rows, of 8 features and 40 bytes of integers."""
    found = predicted(Cluster(2, 2, 100), ranks=2, exchange_s=TOGETHER)
    assert found.parts_s["compute"] == pytest.approx(0.1 - 0.01)
    assert found.parts_s["sweeps"] == pytest.approx(0.01 + 0.03 - 0.01 - 2 * 0.002)
    assert found.parts_s["embeddings"] == pytest.approx(2 * 0.002)
    assert found.step_s.expected == pytest.approx(sum(found.parts_s.values()) - found.parts_s["reading"])
    bytes_a_step = 2 * (512 * 8 * 4 + 512 * 40) + 2 / 2 * 4_000_000
    assert found.exchange_bytes_per_s * found.step_s.expected == pytest.approx(bytes_a_step)
    exchange = found.step_s.expected - 0.1
    assert found.step_s.high == pytest.approx(0.1 + plan.MEASURED_WITHIN * exchange)


def test_beyond_this_machine_the_network_decides_and_is_less_sure(predicted):
    slow, fast = (predicted(Cluster(4, 2, gbit), ranks=2, exchange_s=TOGETHER) for gbit in (1e-2, 1e3))
    assert slow.nodes == 2 and slow.parts_s["gradients"] > 10 * fast.parts_s["gradients"]
    assert fast.step_s.high == pytest.approx(0.1 + plan.ASSUMED_WITHIN * (fast.step_s.expected - 0.1))
    assert any("1000 Gbit/s" in line for line in fast.assumed) and "gradients" in slow.limit


def test_what_limits_is_told_with_its_cure(predicted):
    assert predicted().limit.startswith("computing")
    assert predicted(wait_s=0.04).limit.startswith("data, 40% of a step: more data.workers")
    assert predicted(read_rate=1e3).limit.startswith("reading")


def test_memory_grows_by_the_rows_of_others(predicted):
    one, four, apart = (
        predicted(cluster, settings={"objective.contrast": contrast}).memory_bytes
        for cluster, contrast in (
            (Cluster(1, 1, 1), "global"),
            (Cluster(4, 4, 1), "global"),
            (Cluster(4, 4, 1), "rank"),
        )
    )
    assert one == apart == 1e9 and four == 1e9 + 2 * 3 * (2 * 4 * 32) * 8 * 4


def test_a_batch_is_shared_by_all_ranks(small_config):
    config = replace(small_config, {"pretrain.batch_size": 24, "engine.accumulation_steps": 2})
    assert plan.share_of_a_rank(config, 4).pretrain.batch_size == 6
    assert plan.rows_of(plan.share_of_a_rank(config, 4)) == 2 * 3 * 32
    with pytest.raises(ConfigError, match=r"24 is that of all ranks, and not a multiple of 5 ranks × 2 .*give e.g. 20"):
        plan.share_of_a_rank(config, 5)


def test_a_plan_is_read_as_it_was_written_and_told_in_lines(predicted, tmp_path):
    found = predicted(Cluster(4, 2, 100), ranks=2, exchange_s=TOGETHER)
    found.write(tmp_path / "plan.json")
    assert RunPlan.read(tmp_path / "plan.json") == found
    told = plan.told(found)
    for said in ("measured here", "assumed", "predicted", "GPU-hours", "limit: ", "4 GPUs or processes on 2 machines"):
        assert said in told


@pytest.mark.parametrize(
    ("settings", "of_plan", "said"),
    [
        ({"views.size": [8, 8, 8]}, {}, "another views.size"),
        ({}, {"gpus": 2}, "of 2 GPUs or processes, and these are 1"),
        ({}, {"shards": "0"}, "other shards"),
    ],
)
def test_a_run_refuses_the_plan_of_another(predicted, small_config, shards, tmp_path, settings, of_plan, said):
    of = dataclasses.replace(predicted(), **of_plan)
    config = replace(small_config, {"pretrain.batch_size": 16} | settings)
    with pytest.raises(RunError, match=rf"--plan: is .*{said}.*; leave out --plan") as refused:
        pretrain(config, shards=shards, run=tmp_path / "run", plan=of)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpus 0 --hours 1", "no count"),
        ("--gpus 2 --hours 0", "no number of hours"),
        ("--gpus 2 --hours 1 --network-gbit -1", "no rate"),
        ("--gpus 2 --hours 1 --out nowhere/plan.json", "its folder does not exist"),
        ("--gpus 3 --hours 1", "not a multiple of 3"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(words, said, shards, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "measure", lambda *_: pytest.fail("it was measured"))
    try:
        code = cli.main(["plan", "--data", str(shards), *shlex.split(words), *shlex.split(SMALL)])
    except SystemExit as ending:
        code = ending.code
    assert code == 2 and said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_are_planned_and_the_run_tells_what_came_of_it(shards, tmp_path):
    """Of a busy machine the rate is not held to more than its unit: it is wrong by no factor of 1,000."""
    out, run = tmp_path / "plan.json", tmp_path / "run"
    settings = shlex.split(f"{SMALL} --pretrain.log_every 1")
    mixcl("plan", "--data", shards, "--gpus", 2, "--hours", 1, "--seconds", 1, "--out", out, *settings)
    behind = ["pretrain", "--data", shards, "--run", run, "--plan", out, *settings, "--pretrain.steps", 12]
    said = mixcl("launch", "local", "--processes", 2, "--", *behind)
    recorded = PretrainRecord.load(run).plan
    assert recorded == RunPlan.read(out) and recorded.gpus == 2 and recorded.machine.cpu
    assert "Planned" in said and "2 GPUs or processes; measured" in said
    measured = float(said.partition("measured ")[2].split()[0])
    assert measured / 30 < recorded.patches_per_s.expected < 30 * measured


def mixcl(*words):
    command = [sys.executable, "-m", "mixcl_dist", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
