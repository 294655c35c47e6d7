"""What a pre-training that goes on, or begins with another's network, refuses can be mended as its message says."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from mixcl_dist import cli
from mixcl_dist.config import load, replace
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.networks.architectures import check_patches
from mixcl_dist.pretraining import pretrain as loop
from mixcl_dist.pretraining.pretrain import check_settings, pretrain
from mixcl_dist.pretraining.probe import probe_run
from mixcl_dist.records import ANEW

from ..conftest import commands
from ..cures import interrupt, refused


class Begins(Exception):
    """All was accepted, and the processes would be joined."""


@pytest.fixture
def begins(monkeypatch):
    """Passes a function that begins to pre-train, or to go on, and does not learn."""

    def stop(*arguments):
        raise Begins

    def check(*arguments, **options):
        with monkeypatch.context() as patch, pytest.raises(Begins):
            patch.setattr(loop, "_launch", stop)
            pretrain(*arguments, **options)

    return check


@pytest.fixture
def config(runs):
    """As the run was made."""
    return load(runs / "pre" / "config.yaml")


def test_a_run_that_is_there_is_gone_on_with_or_another_made(runs, shards, config, begins):
    said = "go on with --resume latest, or give another --run"
    refused(said, pretrain, config, shards=shards, run=runs / "pre")
    begins(config, shards=shards, run=runs / "pre", resume=True)
    begins(config, shards=shards, run=runs / "other")


def test_where_there_is_nothing_to_go_on_with_a_run_is_begun(runs, shards, config, begins):
    refused("leave out --resume", pretrain, config, shards=shards, run=runs / "other", resume=True)
    begins(config, shards=shards, run=runs / "other")


def test_a_run_goes_on_with_its_shards(runs, shards, cohort, config, begins, tmp_path):
    build(cohort[:1], tmp_path / "others", config.build)
    others = {"shards": tmp_path / "others", "resume": True}
    said = "was begun on other shards; give those as --data, or start anew with another --run"
    refused(said, pretrain, config, run=runs / "pre", **others)
    begins(config, shards=shards, run=runs / "pre", resume=True)
    begins(config, shards=tmp_path / "others", run=runs / "other")


def test_a_run_goes_on_with_its_settings(runs, shards, config, begins):
    changed = replace(config, {"pretrain.steps": 3, "optimizer.weight_decay": 0.5})
    said = "pre: (.*) differs from the run's config.yaml; leave it out, or start anew"
    names = refused(said, pretrain, changed, shards=shards, run=runs / "pre", resume=True)
    assert set(names.split(", ")) == {"pretrain.steps", "optimizer.weight_decay"}
    begins(config, shards=shards, run=runs / "pre", resume=True)
    begins(changed, shards=shards, run=runs / "other")


def test_a_run_goes_on_with_what_it_began_from(runs, shards, config, begins):
    said = "goes on with that; leave out --start"
    refused(said, pretrain, config, shards=shards, run=runs / "pre", start=runs / "few", resume=True)
    begins(config, shards=shards, run=runs / "pre", resume=True)


def test_a_start_that_was_interrupted_is_run_to_its_end_or_exchanged(runs, finished, shards, again, config, begins):
    interrupt(runs / "pre")
    said = "give its mixcl pretrain command again with (--resume latest), or give another --start"
    words = refused(said, pretrain, config, shards=shards, run=runs / "next", start=runs / "pre")
    begins(config, shards=shards, run=runs / "next", start=finished / "pre")
    again("pre", *words.split())
    begins(config, shards=shards, run=runs / "next", start=runs / "pre")


def test_a_start_of_another_network_is_given_its_settings_or_exchanged(runs, shards, config, begins):
    wider = replace(config, {"network.voxel_dim": 16})
    said = "differs in (.*); give the same settings, or another --start"
    assert refused(said, pretrain, wider, shards=shards, run=runs / "next", start=runs / "pre") == "network.voxel_dim"
    begins(config, shards=shards, run=runs / "next", start=runs / "pre")


def test_a_damaged_start_is_made_again(runs, shards, data, config, begins):
    (runs / "pre" / "pretrain.safetensors").write_bytes(b"damaged")
    said = f"copy it again, or {ANEW}"
    refused(said, pretrain, config, shards=shards, run=runs / "next", start=runs / "pre")
    (runs / "pre").rename(runs / "away")
    assert cli.main(commands(runs, shards, data)["pre"]) == 0
    begins(config, shards=shards, run=runs / "next", start=runs / "pre")


def test_a_damaged_record_is_made_again(runs, shards, config, begins):
    (runs / "pre" / "run.json").write_text("{}")
    refused(f"{ANEW}$", pretrain, config, shards=shards, run=runs / "pre", resume=True)
    (runs / "pre").rename(runs / "away")
    begins(config, shards=shards, run=runs / "pre")


def test_shards_of_validation_alone_are_built_with_what_is_trained_on():
    manifest = SimpleNamespace(patch_size=(24, 24, 24), classes=("liver",), cases=[])
    given = load(overrides=[("views.size", "16,16,16"), ("network.filters", "4,6,8")])
    said = "build them with --(build.splits) (?:training,unlabelled)$"
    setting = refused(said, check_settings, given, manifest)
    assert load(overrides=[(setting, "training,unlabelled")]).build.splits == ("training", "unlabelled")


def test_machines_that_see_different_folders_are_given_one_that_they_share(runs, monkeypatch):
    def see(others):
        return SimpleNamespace(rank=0, gather=lambda own: [own, *others])

    monkeypatch.setattr(loop, "SHARED_TRIES", 1)
    (runs / "pre" / ".lock").write_text("host 1")
    refused("ranks 0 and 1 see different folders; give a --run that all", loop._check_shared, runs / "pre", see([None]))
    loop._check_shared(runs / "pre", see(["host 1"]))


def test_a_probe_is_of_two_scans_that_the_run_has_not_seen(runs, shards, config):
    def keeping_back(*names):
        return replace(config, {"budget.development": names})

    refused("names no two scans to probe on; give them", probe_run, None, keeping_back("abdomen_000"), shards=shards)
    said = "holds no case x; give the shards that the development scans are in"
    refused(said, probe_run, None, keeping_back("abdomen_000", "x"), shards=shards)
    trained_on = [case.name for case in Manifest.load(shards).cases if case.name not in config.budget.development]
    wanted = keeping_back(*trained_on[:2])
    said = f"was pre-trained on development scan .*; pre-train with --(budget.development) {','.join(trained_on[:2])}$"
    setting = refused(said, probe_run, runs / "pre", wanted, shards=shards)
    assert load(overrides=[(setting, ",".join(trained_on[:2]))]).budget == wanted.budget
    probe_run(runs / "pre", config, shards=shards)  # which was pre-trained so, with others


@pytest.mark.parametrize(
    ("architecture", "filters", "cured"),
    [
        ("residual_dynunet", "4,4,6,6,8", {"network.filters": "4,6,8"}),
        ("resenc_unet", "4,4,6,6,8", {"network.filters": "4,6,8"}),
        ("segresnet", "8,16,32,64,128", {"network.filters": "8,16,32"}),
        ("swin_unetr", "12,12,24,48,96,192", {"network.architecture": "segresnet", "network.filters": "8,16,32"}),
    ],
)
def test_a_probe_of_any_network_that_patches_are_too_small_for(
    runs, shards, config, cohort, tmp_path, architecture, filters, cured
):
    """Of a random one: another setting, or shards of larger patches, are taken as they are said."""
    if architecture == "resenc_unet":
        reason = "dynamic-network-architectures is not installed; pip install -e '.[nnunet]'"
        pytest.importorskip("dynamic_network_architectures", reason=reason)
    words = ["probe", "none", "--out", str(tmp_path / "probe.json")]
    words += ["--budget.development", ",".join(config.budget.development)]
    large = replace(
        config, {"network.architecture": architecture, "network.filters": [int(n) for n in filters.split(",")]}
    )
    setting = next(iter(cured))
    said = rf"patches of 24 x 24 x 24 .*; build shards with edges of (\d+) or more, or \w+ (?:fewer )?{setting}$"
    edge = refused(said, probe_run, None, large, shards=shards)
    options = {"network.architecture": architecture} | cured
    smaller = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert cli.main([*words, "--data", str(shards), *smaller]) == 0
    check_patches(large.network, [int(edge)] * 3)


def test_a_probe_of_a_network_that_is_not_there_is_given_a_whole_one(runs, shards, config, tmp_path):
    (step,) = (runs / "pre" / "checkpoints").iterdir()
    shutil.copy(step / "network.safetensors", tmp_path)
    (step / "network.safetensors").write_bytes(b"damaged")
    refused("give a finished run or a whole checkpoint", probe_run, step, config, shards=shards)
    shutil.copy(tmp_path / "network.safetensors", step)
    probe_run(step, config, shards=shards)
