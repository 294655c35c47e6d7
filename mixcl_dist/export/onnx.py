"""ONNX: the public network as a graph that any runtime computes, run once beside torch before it is handed on."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixcl_dist.export.card import card, times
from mixcl_dist.export.trained import ExportError, Trained
from mixcl_dist.networks import architectures

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of a logit between ONNX Runtime and torch, both in float32 on a CPU, as a share of the largest
logit. What is seen is a hundred times less."""
INPUT, OUTPUT = "image", "logits"
FILE, PREPROCESSING = "model.onnx", "preprocessing.json"

_USE = """\
In this folder, with `onnxruntime` and `numpy`:

```python
import json
import numpy as np
import onnxruntime
preprocessing = json.load(open("preprocessing.json"))
session = onnxruntime.InferenceSession("model.onnx")
hu = np.load("patch.npy")  # (x, y, z) Hounsfield units, oriented and at the spacing of preprocessing.json
low, high = preprocessing["window_hu"]
image = np.clip((hu.astype("float32") - low) / (high - low) * 2 - 1, -1, 1)[None, None]
(logits,) = session.run(["logits"], {"image": image})
classes = logits.argmax(1)[0]  # 0 is background, k is preprocessing["classes"][k - 1]
```

A whole CT is segmented by windows of `patch_size` that have `sliding_overlap` of an edge in common and count by a
Gaussian around their middle; beyond the CT is air, -1 (MONAI: `SlidingWindowInferer(mode="gaussian", cval=-1)`)."""


def write(trained: Trained, folder: Path) -> None:
    """Write model.onnx, preprocessing.json and README.md.

    Raises `ExportError` for a run without classes, where a package is missing, and where ONNX Runtime computes other
    logits than torch.
    """
    if not trained.is_segmentation:
        raise ExportError(
            f"{trained.run}: an ONNX graph only computes, and this run is a pre-training; fine-tune it first "
            "(mixcl finetune --from), or export it to monai"
        )
    _check_packages()
    network = trained.architecture.build(trained.network, len(trained.classes) + 1).eval()
    network.load_state_dict(trained.state_dict())
    _save(network, trained, folder / FILE)
    difference = _difference(network, trained, folder / FILE)
    if not difference <= TOLERANCE:
        cure = "export with the packages of constraints.txt, or export to monai"
        raise ExportError(f"{trained.run}: ONNX Runtime's logits differ by {difference:.1e} of the largest; {cure}")
    (folder / PREPROCESSING).write_text(json.dumps(_preprocessing(trained, difference), indent=1) + "\n")
    (folder / "README.md").write_text(card(trained, f"{trained.facts['name']} in ONNX", _USE, _notes(trained)))


def _check_packages() -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ExportError(f"--to onnx needs {name}; pip install 'mixcl-dist[onnx]', or export to monai") from None


def _save(network: torch.nn.Module, trained: Trained, file: Path) -> None:
    steps = architectures.divisor(trained.network)
    axes: dict[int, Any] = {0: torch.export.Dim("batch")}
    edges = trained.patch_size
    if not trained.architecture.ONE_SIZE:
        axes |= {2 + n: steps[n] * torch.export.Dim(name, min=2) for n, name in enumerate("xyz")}
        edges = [max(edge, 2 * step) for edge, step in zip(edges, steps, strict=True)]
    given: dict[str, Any] = {
        "dynamic_shapes": (axes,),
        "input_names": [INPUT],
        "output_names": [OUTPUT],
        "opset_version": OPSET,
    }
    with _quietly():
        program = torch.onnx.export(network, (torch.zeros(2, 1, *edges),), verbose=False, **given)
    assert program is not None
    program.save(file)


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter tells of its own deprecations, and of packages that it would know, too."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _difference(network: torch.nn.Module, trained: Trained, file: Path) -> float:
    """Largest difference of the logits of two noisy patches, as a share of the largest logit."""
    import onnxruntime

    random = torch.Generator().manual_seed(0)
    image = torch.rand(2, 1, *trained.patch_size, generator=random) * 2 - 1
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (there,) = session.run([OUTPUT], {INPUT: image.numpy()})
    with torch.inference_mode():
        here = network(image).numpy()
    return float(np.abs(there - here).max() / np.abs(here).max())


def _preprocessing(trained: Trained, difference: float) -> dict[str, Any]:
    """What a program has to do before and after, as plain JSON values."""
    steps = None if trained.architecture.ONE_SIZE else architectures.divisor(trained.network)
    known = trained.description.content()
    told = ("window_hu", "spacing_mm", "classes", "patch_size", "sliding_overlap")
    return {
        "format": known["format"],
        "orientation": "RAS",
        "input_range": [-1.0, 1.0],
        **{key: known[key] for key in told},
        "edges_multiple_of": steps,
        "smallest_edges": steps and [2 * step for step in steps],
        "input": INPUT,
        "output": OUTPUT,
        "opset": OPSET,
        "difference_from_torch": difference,
    }


def _notes(trained: Trained) -> str:
    size = times(trained.patch_size)
    sizes = (
        f"any number of images of {size} voxels: this network lays its windows out by the size"
        if trained.architecture.ONE_SIZE
        else "any number of images of any size that the network takes (see above)"
    )
    return f"""\
## The graph

- `model.onnx`: opset {OPSET}, float32, input `{INPUT}` (batch, 1, x, y, z), output `{OUTPUT}`; {sizes}.
- When it was exported, ONNX Runtime and torch computed logits of two patches of {size} voxels that differed by less
  than {TOLERANCE:g} of the largest; `difference_from_torch` in `preprocessing.json` is what was found."""
