"""A Hugging Face model folder: safetensors, config.json and a model card with front matter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from mixcl_dist.export.card import card
from mixcl_dist.export.monai import describe, located
from mixcl_dist.export.trained import Trained

_USE = """\
```python
import inspect, json
from {module} import {name}
from safetensors.torch import load_file
config = json.load(open("config.json"))
arguments = {{name: config[name] for name in inspect.signature({name}).parameters if name in config}}
{located}network = {name}(**arguments{out_channels})
network.load_state_dict(load_file("model.safetensors"), strict=False)
```

{why}"""
_MIXIN = """ With `huggingface_hub`, `class Network({name}, PyTorchModelHubMixin): pass` loads it by
`Network.from_pretrained(FOLDER_OR_NAME{out_channels})`."""
_KNOWN_LICENCES = frozenset(
    f"cc-by{terms}-{version}" for terms in ("", "-sa", "-nc", "-nd", "-nc-sa", "-nc-nd") for version in ("3.0", "4.0")
) | {"cc0-1.0", "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause"}
"""Hugging Face's identifiers of licences that CT is under; any other is "other" there, with a name."""
_ALIASES = "Some networks list layers a second time, as DynUNet under `skip_layers`; the file holds each tensor once."

_RANDOM = " The output layer starts from random weights: it belongs to your classes."


def write(trained: Trained, folder: Path) -> None:
    """Write model.safetensors, config.json, network.json and README.md."""
    save_file(trained.weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(trained), indent=1) + "\n")
    trained.description.save(folder)
    public = trained.architecture
    module, _, name = public.CLASS.rpartition(".")
    outputs = "" if trained.is_segmentation else f", {public.OUTPUTS}=4"
    random = (
        "" if trained.is_segmentation else " The output layer starts from random weights: it belongs to your classes."
    )
    mixin = "" if public.IMPORTED else _MIXIN.format(name=name, out_channels=outputs)
    use = _USE.format(
        module=module, name=name, located=located(public.IMPORTED), out_channels=outputs, why=_ALIASES + random + mixin
    )
    text = card(trained, trained.facts["name"], f"In this folder:\n\n{use}")
    (folder / "README.md").write_text(_front_matter(trained) + text)


def _config(trained: Trained) -> dict[str, Any]:
    """The network's arguments are at the top, where huggingface_hub's mixin looks for those of a class by name."""
    description = {
        key: value for key, value in describe(trained).items() if key != "patch_size"
    }  # SwinUNETR's is another
    return {"library_name": "monai"} | description.pop("arguments") | description


def _front_matter(trained: Trained) -> str:
    licence = re.sub(r"[^a-z0-9.]+", "-", (trained.licence or "terms of the training data").casefold()).strip("-")
    head = {
        **({"license": licence} if licence in _KNOWN_LICENCES else {"license": "other", "license_name": licence}),
        "library_name": "monai",
        "pipeline_tag": "image-segmentation",
        "tags": ["medical-imaging", "computed-tomography", "3d-segmentation", "monai", "mixcl"]
        + ([] if trained.is_segmentation else ["self-supervised-learning", "pretrained-encoder"]),
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
