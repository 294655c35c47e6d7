"""Exports load into the tools they are for, and compute there what the trained network computes here."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import pydoc
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.networks.nets import DynUNet
from safetensors.torch import load_file

from mixcl_dist.cli import main
from mixcl_dist.data_shards.volume import Volume
from mixcl_dist.export import ExportError, export
from mixcl_dist.finetuning import scoring
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.networks.dynunet import Backbone
from mixcl_dist.settings import NetworkConfig

from .written import CLASSES, FILTERS, PATCH, perturbed, run_snippet, write_run


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return perturbed(Backbone(NetworkConfig(filters=FILTERS)))


@pytest.fixture(scope="module")
def segmenter() -> SegmentationNetwork:
    torch.manual_seed(1)
    return perturbed(SegmentationNetwork(NetworkConfig(filters=FILTERS), len(CLASSES)))


@pytest.fixture
def pretrained(tmp_path: Path, backbone: Backbone) -> Path:
    return write_run(tmp_path / "pre", backbone, "pretrain")


@pytest.fixture
def finetuned(tmp_path: Path, segmenter: SegmentationNetwork) -> Path:
    return write_run(tmp_path / "few", segmenter, "finetune")


SAVE_LOGITS = "\ntorch.save(network(torch.load('image.pt')), 'logits.pt')"


@pytest.mark.parametrize("to", ["monai", "hf"])
def test_fine_tuned_network_gives_equal_logits_from_its_cards_snippet(finetuned, segmenter, tmp_path, to):
    out = export(finetuned, to, tmp_path / "out")
    image = torch.rand(1, 1, 16, 24, 16)
    torch.save(image, out / "image.pt")
    run_snippet(out, "\nimport torch" + SAVE_LOGITS)
    torch.testing.assert_close(torch.load(out / "logits.pt"), segmenter(image))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["monai", "hf"])
def test_pretrained_features_are_equal_from_the_cards_snippet(pretrained, backbone, tmp_path, to):
    out = export(pretrained, to, tmp_path / "out")
    image = torch.rand(1, 1, 16, 24, 16)
    torch.save(image, out / "image.pt")
    run_snippet(out, "\nimport torch\nnetwork.output_block = torch.nn.Identity()" + SAVE_LOGITS)
    torch.testing.assert_close(torch.load(out / "logits.pt"), backbone(image)[-1])


def test_residual_network_is_exported_with_its_residual_blocks(tmp_path):
    network = perturbed(SegmentationNetwork(NetworkConfig("residual_dynunet", FILTERS), len(CLASSES)))
    run = write_run(tmp_path / "run", network, "finetune", "residual_dynunet")
    out = export(run, "monai", tmp_path / "out")
    there = DynUNet(**json.loads((out / "network.json").read_text())["arguments"]).eval()
    there.load_state_dict(torch.load(out / "dynunet.pt", weights_only=True))
    image = torch.rand(1, 1, 16, 16, 16)
    torch.testing.assert_close(there(image), network(image))


def test_hugging_face_card_has_front_matter_and_files_hold_each_tensor_once(finetuned, tmp_path):
    out = export(finetuned, "hf", tmp_path / "out")
    _, front_matter, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front_matter)["license"] == "other"
    assert "inherit the terms of the data" in text
    assert "| liver | 90.0 |" in text and "labels of 2 scans" in text and "RAS" in text
    assert not [name for name in load_file(out / "model.safetensors") if name.startswith("skip_layers")]
    assert json.loads((out / "config.json").read_text())["classes"] == CLASSES


@pytest.mark.parametrize(
    ("given", "head"),
    [
        ("CC-BY-NC-3.0", {"license": "cc-by-nc-3.0"}),
        ("Data Use Agreement 1", {"license": "other", "license_name": "data-use-agreement-1"}),
    ],
)
def test_a_licence_that_is_given_stands_in_front_matter_and_card(finetuned, tmp_path, given, head):
    """As Hugging Face's metadata has it: its identifier, or "other" with a name."""
    text = (export(finetuned, "hf", tmp_path / "out", licence=given) / "README.md").read_text()
    _, front_matter, card = text.split("---\n", 2)
    found = {key: value for key, value in yaml.safe_load(front_matter).items() if key.startswith("license")}
    assert found == head
    assert f"The weights are under {given}: " in card and "does not record" not in card


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_config_json_builds_the_network_as_huggingface_hubs_mixin_does(kind, request, tmp_path):
    """It gives a class those entries of config.json that its constructor names, and loads the weights not strictly."""
    out = export(request.getfixturevalue(kind), "hf", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    given = {name: config[name] for name in inspect.signature(DynUNet.__init__).parameters if name in config}
    network = DynUNet(**({"out_channels": 4} | given if kind == "pretrained" else given))
    _, unexpected = network.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    assert not unexpected and list(given["filters"]) == list(FILTERS)


def test_huggingface_hubs_mixin_loads_the_folder(finetuned, segmenter, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed; pip install huggingface_hub")
    out = export(finetuned, "hf", tmp_path / "out")
    network = type("Network", (DynUNet, hub.PyTorchModelHubMixin), {}).from_pretrained(out).eval()
    image = torch.rand(1, 1, 16, 24, 16)
    torch.testing.assert_close(network(image), segmenter(image))


def test_a_pretrainings_card_tells_its_facts_and_nothing_of_fine_tuning(pretrained, tmp_path):
    facts = json.loads((pretrained / "run.json").read_text())
    facts |= {"datasets": {"kidneys_2": 7, "*lungs*": 5}, "withheld_cases": ["v0", "v1", "v2"], "finished": "then"}
    facts |= {"seconds": 7205.4, "machine": {"cpu": "a processor", "gpu": "a <GPU>", "cores": 16}}
    (pretrained / "run.json").write_text(json.dumps(facts))
    steps = [{"step": step, "reconstruction": 1 / step, "samples": 8 * step} for step in (1, 2)]
    (pretrained / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    card = (export(pretrained, "monai", tmp_path / "out") / "README.md").read_text()
    assert "views of 16 × 16 × 24" in card and "fine-tuning" not in card.replace("to be fine-tuned", "")
    for fact in (
        "Trained for 2 steps on 2 CT volumes (16 patches drawn) by reconstruction: reconstruction error 1 → 0.5.",
        r"kidneys_2 (7), \*lungs\* (5)",
        "labels were read of 2 scans",
        "3 scans of the shards were withheld",
        "1,000 steps in 7,205 s on a &lt;GPU&gt;, 16 cores",
        "## Licence",
    ):
        assert fact in card


@pytest.fixture
def ct_file(tmp_path: Path) -> Path:
    """A CT stored as LPS with uneven spacing and size, so that wrong axes cannot go unnoticed."""
    rng = np.random.default_rng(0)
    hu = rng.normal(0, 400, (30, 40, 20)).astype(np.int16)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "case.nii.gz"
    nib.save(nib.Nifti1Image(hu, np.diag([-1.5, -2.0, 3.0, 1.0])), path)
    return path


def our_segmentation(path: Path, network: SegmentationNetwork) -> np.ndarray:
    image = nib.as_closest_canonical(nib.load(path))
    volume = Volume(np.ascontiguousarray(image.dataobj, dtype=np.int16), image.affine, None)
    settings = {"spacing_mm": None, "window_hu": (-900.0, 700.0), "patch_size": PATCH, "overlap": 0.25}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "autocast", lambda device: contextlib.nullcontext())  # float32, as in a bundle
        return scoring.segment(network, volume, **settings, device=torch.device("cpu"))


def test_bundles_transforms_network_and_inferer_segment_as_we_do(finetuned, segmenter, ct_file, tmp_path):
    out = export(finetuned, "bundle", tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_meta(out / "configs" / "metadata.json")
    parser.read_config(out / "configs" / "inference.json")
    parser.update({"bundle_root": str(out), "dataset_dir": str(ct_file.parent), "device": torch.device("cpu")})
    network = parser.get_parsed_content("network")
    network.load_state_dict(torch.load(out / "models" / "model.pt", weights_only=True))
    sample = parser.get_parsed_content("dataset")[0]
    with torch.inference_mode():
        logits = parser.get_parsed_content("inferer")(sample["image"][None], network.eval())[0]
    ours = our_segmentation(ct_file, segmenter)
    assert len(np.unique(ours)) > 1
    assert (logits.argmax(0).numpy() == ours).mean() > 0.999  # resolution of float32 at ties


def test_bundles_metadata_has_what_monais_schema_requires(finetuned, tmp_path):
    out = export(finetuned, "bundle", tmp_path / "bundle")
    metadata = json.loads((out / "configs" / "metadata.json").read_text())
    required = "schema version monai_version pytorch_version numpy_version required_packages_version task description"
    assert not {*required.split(), "authors", "copyright", "network_data_format"} - metadata.keys()
    for tensor in [metadata["network_data_format"][side] for side in ("inputs", "outputs")]:
        for described in tensor.values():
            assert {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"} <= described.keys()
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["2"] == "left_kidney"
    assert (out / "LICENSE").is_file()


def test_nnunet_checkpoint_is_plain_data_that_loads_without_unpickling_code(pretrained, tmp_path):
    out = export(pretrained, "nnunet", tmp_path / "out")
    checkpoint = torch.load(out / "checkpoint_final.pth", weights_only=True)
    plan = checkpoint["nnssl_adaptation_plan"]
    assert plan == json.loads((out / "adaptation_plan.json").read_text())
    configuration = next(iter(plan["pretrain_plan"]["configurations"].values()))
    assert configuration == {"spacing": [3.0, 2.0, 1.0], "patch_size": [24, 16, 16]}  # (z, y, x)
    assert plan["recommended_downstream_patchsize"] == [32, 24, 16]


def test_nnunets_own_network_computes_the_same_encoder_features(pretrained, backbone, tmp_path):
    name = "dynamic_network_architectures"
    pytest.importorskip(
        f"{name}.architectures.unet", reason=f"{name} is not installed; pip install dynamic-network-architectures"
    )
    out = export(pretrained, "nnunet", tmp_path / "out")
    checkpoint = torch.load(out / "checkpoint_final.pth", weights_only=True)
    plan, weights = checkpoint["nnssl_adaptation_plan"], checkpoint["network_weights"]
    network = network_from_plan(plan["architecture_plans"])
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):  # as nnU-Net's trainer loads them, strictly
        part = {k.removeprefix(f"{key}."): v for k, v in weights.items() if k.startswith(key)}
        network.get_submodule(key).load_state_dict(part)
    image = torch.rand(2, 1, 16, 24, 32)
    with torch.inference_mode():
        here = [backbone.input_block(image)]
        for block in (*backbone.downsamples, backbone.bottleneck):
            here.append(block(here[-1]))
        there = network.encoder(image.permute(0, 1, 4, 3, 2))
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(theirs.permute(0, 1, 4, 3, 2), ours, rtol=1e-4, atol=1e-4)


def network_from_plan(architecture: dict) -> torch.nn.Module:
    arguments = dict(architecture["arch_kwargs"])
    for name in architecture["arch_kwargs_requiring_import"]:
        arguments[name] = arguments[name] and pydoc.locate(arguments[name])
    module, _, name = architecture["arch_class_name"].rpartition(".")
    network = getattr(importlib.import_module(module), name)
    return network(input_channels=1, num_classes=3, deep_supervision=False, **arguments).eval()


@pytest.mark.parametrize(("to", "card"), [("monai", "README.md"), ("bundle", "docs/README.md")])
def test_the_command_names_the_card_that_says_how_to_use_it(finetuned, tmp_path, capsys, to, card):
    out = tmp_path / "out"
    assert main(["export", str(finetuned), "--to", to, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}; how to use it stands in {out / card}\n"


def test_existing_folder_is_refused_and_left_alone(pretrained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ExportError, match="exists already; give a new folder"):
        export(pretrained, "monai", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize(
    ("to", "break_run", "message"),
    [
        ("bundle", lambda run: None, "fine-tune it first"),
        (
            "monai",
            lambda run: (run / "network.safetensors").unlink(),
            "no network yet; give its mixcl pretrain command again",
        ),
        ("monai", lambda run: (run / "network.safetensors").write_bytes(b"cut"), "cannot be read"),
        ("monai", lambda run: (run / "network.json").write_text("{}"), "'architecture' is missing"),
        ("monai", lambda run: change(run, filters=[4, 6, 8, 12]), "does not fit network.json"),
        ("nnunet", lambda run: change(run, architecture="residual_dynunet"), "does not fit network.json"),
        ("monai", lambda run: (run / "run.json").unlink(), "no such file"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(pretrained, tmp_path, to, break_run, message):
    break_run(pretrained)
    with pytest.raises(ValueError, match=message) as error:
        export(pretrained, to, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["pre"]


def change(run: Path, **description: object) -> None:
    file = run / "network.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | description))


def test_nnunet_refuses_residual_blocks_with_the_cure(tmp_path):
    run = write_run(
        tmp_path / "run", Backbone(NetworkConfig("residual_dynunet", FILTERS)), "pretrain", "residual_dynunet"
    )
    with pytest.raises(ExportError, match=r"--network\.architecture dynunet, or export to monai"):
        export(run, "nnunet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nnunet_refuses_kernels_that_its_decoder_has_elsewhere_with_the_cure(pretrained, tmp_path):
    network = NetworkConfig(filters=FILTERS, kernel_spacing_mm=(1.0, 1.0, 5.0))
    run = write_run(tmp_path / "run", Backbone(network), "pretrain")
    change(run, kernel_spacing_mm=[1.0, 1.0, 5.0])
    with pytest.raises(ExportError, match=r"network\.kernel_spacing_mm; pre-train without it, or export to monai"):
        export(run, "nnunet", tmp_path / "out")
    card = (export(run, "monai", tmp_path / "other") / "README.md").read_text()
    assert "Edges must be multiples of 8 × 8 × 2 voxels, and at least 16 × 16 × 4" in card


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> tuple[Path, dict[str, str], set[str]]:
    """A fine-tuned run of a tiny network, its text files, and all strings of its bundle's configuration."""
    folder = tmp_path_factory.mktemp("stranger")
    run = write_run(folder / "few", SegmentationNetwork(NetworkConfig(filters=(2, 2, 2)), len(CLASSES)), "finetune")
    change(run, filters=[2, 2, 2])
    out = export(run, "bundle", folder / "bundle")
    files = {name: (run / name).read_text() for name in ("config.yaml", "network.json", "run.json", "dice.json")}
    return run, files, set(strings_of(json.loads((out / "configs" / "inference.json").read_text())))


def strings_of(tree: object) -> list[str]:
    if isinstance(tree, dict):
        return [*tree, *strings_of(list(tree.values()))]
    return (
        [text for item in tree for text in strings_of(item)] if isinstance(tree, list) else [tree] * (str is type(tree))
    )


def leaves_of(tree: object, path: tuple = ()) -> list[tuple]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    return [path] if pairs is None else [leaf for key, value in pairs for leaf in leaves_of(value, (*path, key))]


def planted(text: str, path: tuple, value: object) -> str:
    tree = node = yaml.safe_load(text)
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(tree)  # JSON is YAML


HOSTILE = (
    "$open('ran', 'w')", "$__import__('os').mkdir('ran')", "@network_def", "%../../run.json", "%run.json::name", "@#x",
    "<script>x</script>", "# title\n---\nlicense: mine", "[x](javascript:x)", "| x |", "`x`", "../../x", "1e9", "",
)  # fmt: skip


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10_000), value=st.sampled_from(HOSTILE) | st.text(max_size=12))
@example(where="config.yaml:finetune.sliding_overlap", value="$open('ran', 'w')")
@example(where="config.yaml:finetune.patch_size.0", value="$open('ran', 'w')")
@example(where="network.json:window_hu.0", value="$open('ran', 'w')")
@example(where="network.json:classes.0", value="$open('ran', 'w')")
@example(where="network.json:classes.0", value="%../../run.json")
@example(where="run.json:name", value="$open('ran', 'w')")
@example(where="dice.json:mean", value="$open('ran', 'w')")
def test_no_string_of_a_strangers_run_is_evaluated_by_its_bundle(small_run, tmp_path_factory, where, value):
    """Each is refused in one line, or becomes a number, or a name that MONAI's parser takes as text."""
    run, files, known = small_run
    places = [(name, path) for name, text in files.items() for path in leaves_of(yaml.safe_load(text))]
    named = {f"{name}:{'.'.join(map(str, path))}": (name, path) for name, path in places}
    name, path = named[where] if isinstance(where, str) else places[where % len(places)]
    for each, text in files.items():
        (run / each).write_text(planted(text, path, value) if each == name else text)
    out = tmp_path_factory.mktemp("out") / "bundle"
    try:
        export(run, "bundle", out)
    except ValueError as error:
        assert "\n" not in str(error) and not out.exists()
        return
    assert set(strings_of(json.loads((out / "configs" / "inference.json").read_text()))) <= known
    for text in strings_of(json.loads((out / "configs" / "metadata.json").read_text())):
        assert not text.startswith(("$", "%")) and "@" not in text
    with contextlib.chdir(out):
        parser = ConfigParser()
        parser.read_meta("configs/metadata.json")
        parser.read_config("configs/inference.json")
        parser.parse()
        for part in ("preprocessing", "inferer", "network_def", "_meta_"):
            parser.get_parsed_content(part)
        assert not os.path.exists("ran")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_in_a_model_card(pretrained, tmp_path, name):
    run = json.loads((pretrained / "run.json").read_text())
    (pretrained / "run.json").write_text(json.dumps(run | {"name": name}))
    out = export(pretrained, "hf", tmp_path / "out")
    _, front_matter, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front_matter)["library_name"] == "monai" and "mine" not in front_matter
    title, rest = card.strip().split("\n", 1)
    assert title.startswith("# ") and "<" not in title and not re.search(r"(?<!\\)[\[\]|`$]", title)
    assert rest.startswith("\nAn encoder-decoder")
