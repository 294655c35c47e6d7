"""ONNX Runtime computes on a real crop, by the card's own snippet, what the trained network computes in torch."""

from __future__ import annotations

import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from mixcl_dist.export import ExportError, export, onnx
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.intensity import normalise
from mixcl_dist.settings import NetworkConfig

from ..cures import refused
from ..networks.small_networks import SMALL
from .written import CLASSES, perturbed, run_snippet, write_run

PATCH, WINDOW_HU = (32, 32, 64), (-900, 700)


@pytest.fixture(scope="module")
def hu(ct):
    """From the middle of a real CT, in RAS."""
    image = nib.as_closest_canonical(nib.load(sorted((ct / "openkbp").rglob("*.nii.gz"))[0]))
    corner = [(n - edge) // 2 for n, edge in zip(image.shape, PATCH, strict=True)]
    window = tuple(slice(first, first + edge) for first, edge in zip(corner, PATCH, strict=True))
    return np.ascontiguousarray(image.dataobj[window])


def of(architecture, folder):
    """A network and the run that holds it."""
    torch.manual_seed(0)
    config = NetworkConfig(architecture, SMALL[architecture])
    network = perturbed(SegmentationNetwork(config, len(CLASSES)))
    return network, write_run(folder, network, "finetune", architecture, SMALL[architecture], PATCH)


@pytest.fixture
def without_graph(monkeypatch):
    """A function after which no graph is made, but one is found to compute logits that differ so much."""

    def replace(difference):
        for name, value in (("_check_packages", None), ("_save", None), ("_difference", difference)):
            monkeypatch.setattr(onnx, name, lambda *given, value=value: value)

    return replace


def agree(there, here):
    """Within the stated share of the largest logit."""
    with torch.inference_mode():
        assert np.abs(there - here.numpy()).max() <= onnx.TOLERANCE * here.abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SMALL)
def test_a_graph_computes_what_torch_computes(architecture, hu, tmp_path):
    package = pytest.importorskip("onnx", reason="onnx is not installed; pip install -e '.[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install -e '.[onnx]'")
    if architecture == "resenc_unet":
        name = "dynamic_network_architectures"
        pytest.importorskip(name, reason=f"{name} is not installed; pip install -e '.[nnunet]'")
    network, run = of(architecture, tmp_path / "run")
    out = export(run, "onnx", tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "model.onnx", "preprocessing.json"]
    graph = package.load(out / "model.onnx")
    package.checker.check_model(graph)
    assert {one.domain: one.version for one in graph.opset_import}[""] == onnx.OPSET

    np.save(out / "patch.npy", hu)
    run_snippet(out, "\nnp.save('logits.npy', logits)\nnp.save('classes.npy', classes)")
    image = normalise(torch.from_numpy(hu), WINDOW_HU)[None, None]
    with torch.inference_mode():
        here = network(image)
    agree(np.load(out / "logits.npy"), here)
    assert (np.load(out / "classes.npy") == here.argmax(1)[0].numpy()).mean() > 0.999  # resolution of float32 at ties

    session = runtime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    told = json.loads((out / "preprocessing.json").read_text())
    steps = told["edges_multiple_of"]
    assert (steps is None) == (architecture == "swin_unetr")
    for size in [(3, *PATCH), *([(1, *np.multiply(steps, (2, 3, 5)))] if steps else [])]:
        image = torch.rand(size[0], 1, *size[1:])
        with torch.inference_mode():
            agree(session.run(["logits"], {"image": image.numpy()})[0], network(image))


@pytest.mark.parametrize("difference", [2 * onnx.TOLERANCE, np.nan])
def test_a_graph_that_computes_something_else_is_not_handed_on(difference, without_graph, tmp_path):
    without_graph(difference)
    _, run = of("dynunet", tmp_path / "run")
    with pytest.raises(ExportError, match=r"logits differ by .* of the largest; export with the packages of"):
        export(run, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", onnx.PACKAGES)
def test_without_a_package_it_is_named_with_what_brings_it(missing, tmp_path, monkeypatch):
    _, run = of("dynunet", tmp_path / "run")
    monkeypatch.setattr(onnx, "PACKAGES", (missing,))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ExportError, match=rf"needs {missing}; pip install 'mixcl-dist\[onnx\]', or export to monai"):
        export(run, "onnx", tmp_path / "out")


def test_a_pretraining_is_fine_tuned_first(runs, tmp_path):
    refused(
        r"fine-tune it first \(mixcl finetune --from\), or export it to monai",
        export,
        runs / "pre",
        "onnx",
        tmp_path / "out",
    )


def test_what_a_program_must_do_before_and_after_stands_beside_the_graph(without_graph, tmp_path):
    without_graph(1e-6)
    _, run = of("dynunet", tmp_path / "run")
    out = export(run, "onnx", tmp_path / "out")
    assert json.loads((out / "preprocessing.json").read_text()) == {
        "format": 1,
        "orientation": "RAS",
        "input_range": [-1.0, 1.0],
        "window_hu": list(WINDOW_HU),
        "spacing_mm": None,
        "classes": CLASSES,
        "patch_size": list(PATCH),
        "sliding_overlap": 0.25,
        "edges_multiple_of": [4, 4, 4],
        "smallest_edges": [8, 8, 8],
        "input": "image",
        "output": "logits",
        "opset": onnx.OPSET,
        "difference_from_torch": 1e-6,
    }
    text = (out / "README.md").read_text()
    assert "opset 20" in text and "| liver | 90.0 |" in text and "32 × 32 × 64" in text
