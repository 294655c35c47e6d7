"""What an export refuses can be mended as its message says: each cure is followed here, to the letter."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from mixcl_dist.config import load
from mixcl_dist.export import export, nnunet
from mixcl_dist.records import ANEW
from mixcl_dist.settings import NetworkConfig

from ..cures import refused


def test_what_is_there_is_kept_and_a_new_folder_taken(runs, tmp_path):
    (tmp_path / "out").mkdir()
    refused("exists already; give a new folder", export, runs / "few", "monai", tmp_path / "out")
    export(runs / "few", "monai", tmp_path / "new")


def test_where_nothing_can_be_written_another_folder_is_taken(runs, tmp_path):
    (tmp_path / "file").touch()
    refused("give a folder that you may write, with room", export, runs / "few", "monai", tmp_path / "file" / "out")
    export(runs / "few", "monai", tmp_path / "out")


def test_a_pretraining_becomes_no_bundle_but_what_is_fine_tuned_from_it_does(runs, tmp_path):
    said = r"fine-tune it first \(mixcl finetune --from\), or export it to (monai)"
    other = refused(said, export, runs / "pre", "bundle", tmp_path / "out")
    export(runs / "pre", other, tmp_path / "other")
    export(runs / "few", "bundle", tmp_path / "out")


def test_other_blocks_than_nnunets_are_exchanged_or_exported_elsewhere(runs, tmp_path):
    given = SimpleNamespace(run="r", network=NetworkConfig(architecture="residual_dynunet"))
    said = "pre-train with --network.architecture (dynunet), or export to monai"  # test_export has the latter
    settings = load(overrides=[("network.architecture", refused(said, nnunet.write, given, tmp_path))])
    assert settings.network.architecture == load(runs / "pre" / "config.yaml").network.architecture
    export(runs / "pre", "nnunet", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("pre", "network.safetensors", "no network yet; give its mixcl pretrain command again with --resume latest"),
        ("few", "model.safetensors", "no network yet; give its mixcl finetune command again$"),
    ],
)
def test_a_run_without_its_network_is_run_to_its_end(runs, again, tmp_path, name, file, said):
    for made_last in (file, "dice.json"):
        (runs / name / made_last).unlink(missing_ok=True)
    refused(said, export, runs / name, "monai", tmp_path / "out")
    again(name, *(["--resume", "latest"] if "--resume latest" in said else []))
    export(runs / name, "monai", tmp_path / "out")


def test_damaged_weights_are_copied_again_or_made_again(runs, finished, again, tmp_path):
    file = runs / "few" / "model.safetensors"
    file.write_bytes(b"damaged")
    refused("; copy it again, or move the folder away and make it again", export, runs / "few", "hf", tmp_path / "out")
    shutil.copy(finished / "few" / file.name, file)
    export(runs / "few", "hf", tmp_path / "out")

    file.write_bytes(b"damaged")
    (runs / "few").rename(runs / "away")
    again("few")
    export(runs / "few", "hf", tmp_path / "again")


def without_digests(run, **changed):
    network = json.loads((run / "network.json").read_text())
    (run / "network.json").write_text(json.dumps(network | {"digests": {}} | changed))


DAMAGE = {
    "run.json": lambda run: (run / "run.json").write_text("{}"),
    "network.json": lambda run: (run / "network.json").write_text("{}"),
    "no network": lambda run: without_digests(run, filters=[4, 4, 4], architecture="swin_unetr"),
    "other network": lambda run: without_digests(run, filters=[4, 6, 10]),
    "weights": lambda run: (without_digests(run), (run / "model.safetensors").write_bytes(b"damaged")),
    "no settings": lambda run: (run / "config.yaml").write_text("3"),
    "no YAML": lambda run: (run / "config.yaml").write_text("{"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_whatever_else_is_damaged_is_made_again(runs, tmp_path, name):
    """That this helps is shown above."""
    DAMAGE[name](runs / "few")
    refused(f"{ANEW}$", export, runs / "few", "monai", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_exchanged_for_one(runs, tmp_path):
    refused("give the folder of a finished run$", export, runs, "monai", tmp_path / "out")
    export(runs / "pre", "monai", tmp_path / "out")
