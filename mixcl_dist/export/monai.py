"""MONAI: the weights of the public network and the arguments that build it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mixcl_dist.export.card import card
from mixcl_dist.export.trained import Trained
from mixcl_dist.networks.architectures import weights_file

_PRETRAINED = """\
```python
import json, torch
from {module} import {name}
description = json.load(open("network.json"))
arguments = description["arguments"]
{located}network = {name}(**arguments, {outputs}=4)  # background and your classes
weights = torch.load("{file}", weights_only=True)
missing, unexpected = network.load_state_dict(weights, strict=False)
assert not unexpected and all(name.startswith("{head}") for name in missing)
```

Only the output layer starts from random weights: it belongs to your classes."""

_SEGMENTATION = """\
```python
import json, torch
from {module} import {name}
description = json.load(open("network.json"))
arguments = description["arguments"]
{located}network = {name}(**arguments).eval()
network.load_state_dict(torch.load("{file}", weights_only=True))
```"""


def write(trained: Trained, folder: Path) -> None:
    """Write the weights, network.json and README.md."""
    file = weights_file(trained.network)
    torch.save(trained.state_dict(), folder / file)
    (folder / "network.json").write_text(json.dumps(describe(trained), indent=1) + "\n")
    public = trained.architecture
    module, _, name = public.CLASS.rpartition(".")
    use = (_SEGMENTATION if trained.is_segmentation else _PRETRAINED).format(
        module=module, name=name, file=file, located=located(public.IMPORTED), outputs=public.OUTPUTS, head=public.HEAD
    )
    (folder / "README.md").write_text(card(trained, trained.facts["name"], f"In this folder:\n\n{use}"))


def located(imported: Sequence[str]) -> str:
    """Lines of a card's code that turn those arguments which name classes into classes; none where none does."""
    if not imported:
        return ""
    return f"import pydoc\narguments.update({{name: pydoc.locate(arguments[name]) for name in {imported}}})\n"


def describe(trained: Trained) -> dict:
    """Class, arguments and input of the network, as plain JSON values."""
    return {
        "class": trained.architecture.CLASS,
        "arguments": trained.network_arguments,
        "orientation": "RAS",
        "input_range": [-1.0, 1.0],
        **trained.description.content(),
    }
