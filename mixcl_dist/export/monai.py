"""MONAI: the weights of a DynUNet and the arguments that build it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mixcl_dist.export.card import card
from mixcl_dist.export.trained import Trained
from mixcl_dist.networks import dynunet

_PRETRAINED = """\
```python
import json, torch
from monai.networks.nets import DynUNet
description = json.load(open("network.json"))
network = DynUNet(**description["arguments"], out_channels=4)  # background and your classes
weights = torch.load("dynunet.pt", weights_only=True)
missing, unexpected = network.load_state_dict(weights, strict=False)
assert not unexpected and all(name.startswith("output_block.") for name in missing)
```

Only the output layer starts from random weights: it belongs to your classes."""

_SEGMENTATION = """\
```python
import json, torch
from monai.networks.nets import DynUNet
description = json.load(open("network.json"))
network = DynUNet(**description["arguments"]).eval()
network.load_state_dict(torch.load("dynunet.pt", weights_only=True))
```"""


def write(trained: Trained, folder: Path) -> None:
    """Write dynunet.pt, network.json and README.md."""
    torch.save(trained.state_dict(), folder / "dynunet.pt")
    (folder / "network.json").write_text(json.dumps(describe(trained), indent=1) + "\n")
    use = _SEGMENTATION if trained.is_segmentation else _PRETRAINED
    (folder / "README.md").write_text(card(trained, trained.facts["name"], f"In this folder:\n\n{use}"))


def describe(trained: Trained) -> dict:
    """Class, arguments and input of the network, as plain JSON values."""
    return {
        "class": dynunet.CLASS,
        "arguments": trained.network_arguments,
        "orientation": "RAS",
        "input_range": [-1.0, 1.0],
        **trained.description.content(),
    }
