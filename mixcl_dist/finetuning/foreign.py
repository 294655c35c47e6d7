"""Checkpoints of others as a start: what of them fits a network here, and whether they saw CT as it is shown here.

Known are the names of nnU-Net and nnssl (PlainConvUNet, ResidualEncoderUNet) and of MONAI's SwinUNETR, its
self-supervised encoder among them, SegResNet and DynUNet, within whatever wrappers training left around them.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixcl_dist.config import ConfigError
from mixcl_dist.errors import RunError
from mixcl_dist.networks.architectures import expected
from mixcl_dist.networks.plain_unet import plain_unet_names
from mixcl_dist.records import Record, Spacing
from mixcl_dist.settings import Architecture, NetworkConfig

WRAPPERS = ("network_weights", "state_dict", "model", "net", "network", "student")
"""Keys of a checkpoint under which its weights may lie."""
PREFIXES = re.compile(r"^(module\.|_orig_mod\.|model\.|network\.|backbone\.)+")
NNUNET = "nnssl_adaptation_plan"
INPUT = (-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Contract(Record):
    """How a network was shown CT: `FILE.contract.json` beside a checkpoint that does not say it itself."""

    CURE = "correct it"

    orientation: Literal["RAS"]
    """Towards which sides its axes x, y, z run."""
    axes: Literal["xyz", "zyx"]
    """In which order arrays have them."""
    spacing_mm: Spacing | None
    """Along x, y, z; None: each case's own."""
    window_hu: tuple[float, float] | None
    """HU that the ends of `input_range` stand for, clipped; None: each case was brought to mean 0 and deviation 1."""
    input_range: tuple[float, float] = INPUT

    def __post_init__(self) -> None:
        for name, pair in (("window_hu", self.window_hu), ("input_range", self.input_range)):
            if pair and pair[0] >= pair[1]:
                raise ValueError(f"{name} {pair} does not rise")


@dataclass(frozen=True, kw_only=True)
class ForeignRecord(Record):
    """`start.json` of a trial that began from a checkpoint of others: what was taken over."""

    FILE = "start.json"
    CURE = "fine-tune again"

    file: str
    architecture: Architecture
    filters: tuple[int, ...]
    contract: Contract
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """Weights that began at random."""
    skipped: tuple[str, ...]
    """Weights of the checkpoint that there was no place for."""


@dataclass(frozen=True)
class Foreign:
    """A checkpoint as a start."""

    file: Path
    network: NetworkConfig
    contract: Contract
    weights: dict[str, Tensor]
    """Those that fit, under the backbone's names, with axes in the order x, y, z."""
    missing: tuple[str, ...]
    """Of the backbone's weights, those that it does not have: they start at random."""
    skipped: tuple[str, ...]
    """Of its weights, those that the backbone has no place for, and why."""

    def record(self) -> ForeignRecord:
        return ForeignRecord(
            file=str(self.file.resolve()),
            architecture=self.network.architecture,
            filters=self.network.filters,
            contract=self.contract,
            matched=tuple(sorted(self.weights)),
            missing=self.missing,
            skipped=self.skipped,
        )

    def told(self) -> str:
        """One line on what was taken over."""
        total = len(self.weights) + len(self.missing)
        parts = [f"{self.file}: {len(self.weights)} of {total} weights of {self.network.architecture} matched"]
        for what, names in (("random", self.missing), ("skipped", self.skipped)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{more})")
        return "; ".join(parts)


def open_foreign(file: Path, window_hu: tuple[float, float]) -> Foreign:
    """Read a checkpoint; no code in it is run. `window_hu` is used where each case was brought to mean 0.

    Raises `RunError`, in one line with the cure, where it cannot be read, is of no known network, does not say how it
    was shown CT, or was shown it in a way that this project cannot.
    """
    checkpoint = _read(file)
    weights = _bare(checkpoint)
    architecture, filters, named = _recognised(file, weights)
    contract = _contract(file, checkpoint)
    if contract.axes == "zyx":
        named = {name: w.permute(0, 1, 4, 3, 2).contiguous() if w.ndim == 5 else w for name, w in named.items()}
    try:
        network = NetworkConfig(architecture, filters, window_hu=contract.window_hu or window_hu)
        network, shapes = _kernels(network, contract, named)
    except (ConfigError, ValueError) as error:
        raise RunError(f"{file}: {error}; only networks of that form can be a start") from None
    fitting = {name: w.float() for name, w in named.items() if name in shapes and w.shape == shapes[name]}
    if not fitting:
        raise RunError(f"{file}: no weight fits {architecture} of {','.join(map(str, filters))}; give another start")
    if spoilt := next((name for name, w in fitting.items() if not w.isfinite().all()), None):
        raise RunError(f"{file}: {spoilt} is not finite; give another start")
    used = set(fitting)
    skipped = [f"{name} {tuple(w.shape)}" if name in shapes else name for name, w in named.items() if name not in used]
    fitting = _shown_alike(file, architecture, contract, fitting)
    missing = sorted(shapes.keys() - used)
    return Foreign(file, network, contract, fitting, tuple(missing), tuple(sorted(skipped)))


def _read(file: Path) -> Mapping[str, Any]:
    cure = "give a checkpoint of plain tensors"
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise RunError(f"{file}: cannot be read without running code in it ({reason}); {cure}") from None
    if not isinstance(checkpoint, dict):
        raise RunError(f"{file}: holds no dictionary of weights; {cure}")
    return checkpoint


def _bare(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights, without what training wrapped around them and their names."""
    inner = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), dict)), checkpoint)
    weights = {PREFIXES.sub("", str(name)): w for name, w in inner.items() if isinstance(w, Tensor)}
    if "patch_embed.proj.weight" in weights:  # MONAI's self-supervised encoder alone, and the heads of its tasks
        encoder = re.compile(r"^(patch_embed|layers\d|norm)\.")
        weights = {f"swinViT.{name}" if encoder.match(name) else name: w for name, w in weights.items()}
    return {name.replace(".mlp.fc", ".mlp.linear"): w for name, w in weights.items()}


def _recognised(file: Path, weights: dict[str, Tensor]) -> tuple[Architecture, tuple[int, ...], dict[str, Tensor]]:
    """Architecture, channels of its levels, and the weights under its backbone's names."""

    def channels(pattern: str) -> tuple[int, ...]:
        """Of weights whose names differ in a number, in the order of that."""
        found = {int(m[1]): w.shape[0] for name, w in weights.items() if (m := re.fullmatch(pattern, name))}
        return tuple(found[n] for n in sorted(found))

    if (patches := weights.get("swinViT.patch_embed.proj.weight")) is not None:
        f = patches.shape[0]
        return "swin_unetr", (f, *(f * 2**level for level in range(5))), weights
    if residual := channels(r"encoder\.stages\.(\d+)\.blocks\.0\.conv1\.conv\.weight"):
        return "resenc_unet", residual, _once(weights)
    if plain := channels(r"encoder\.stages\.(\d+)\.0\.convs\.0\.conv\.weight"):
        here = {there: name for name, names in plain_unet_names(len(plain)).items() for there in names}
        return "dynunet", plain, {here.get(name, name): w for name, w in _once(weights).items()}
    if (first := weights.get("convInit.conv.weight")) is not None:
        levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"down_layers\.(\d+)\.", name)))
        return "segresnet", tuple(first.shape[0] * 2**level for level in range(levels)), weights
    if (
        first := weights.get("input_block.conv1.conv.weight")
    ) is not None and "bottleneck.conv1.conv.weight" in weights:
        filters = (*first.shape[:1], *channels(r"downsamples\.(\d+)\.conv1\.conv\.weight"))
        filters += tuple(weights["bottleneck.conv1.conv.weight"].shape[:1])
        residual_blocks = "input_block.conv3.conv.weight" in weights or "bottleneck.conv3.conv.weight" in weights
        return ("residual_dynunet" if residual_blocks else "dynunet"), filters, weights
    known = "nnU-Net's PlainConvUNet and ResidualEncoderUNet, MONAI's SwinUNETR, SegResNet and DynUNet"
    raise RunError(f"{file}: is of no network that is known here; known are {known}")


def _kernels(
    network: NetworkConfig, contract: Contract, named: Mapping[str, Tensor]
) -> tuple[NetworkConfig, dict[str, torch.Size]]:
    """The network with the kernels, of all levels alike or made for its spacing, that more of the weights fit."""
    either = [network]
    if network.architecture not in ("segresnet", "swin_unetr"):
        either.append(dataclasses.replace(network, kernel_spacing_mm=contract.spacing_mm))
    found = [(one, expected(one)) for one in either]
    return max(found, key=lambda one: sum(name in named and named[name].shape == of for name, of in one[1].items()))


def _once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """nnU-Net's weights under the one of their names by which its blocks compute."""
    alias = {".conv.": ".all_modules.0.", ".norm.": ".all_modules.1."}
    once: dict[str, Tensor] = {}
    for name, w in weights.items():
        name = name.removeprefix("decoder.") if name.startswith("decoder.encoder.") else name
        part = next((part for part in alias if part in name and ".all_modules." not in name), None)
        once[name.replace(part, alias[part]) if part else name] = w
    return once


def _contract(file: Path, checkpoint: Mapping[str, Any]) -> Contract:
    """What the checkpoint says of itself, or a file beside it; raises `RunError` where neither does, or they differ."""
    beside = file.with_name(f"{file.name}.contract.json")
    given = Contract.read(beside) if beside.is_file() else None
    own = _of_nnssl(file, checkpoint[NNUNET]) if isinstance(checkpoint.get(NNUNET), dict) else None
    if given is None and own is None:
        example = '{"orientation": "RAS", "axes": "xyz", "spacing_mm": [1.5, 1.5, 2.0], "window_hu": [-175, 250], '
        raise RunError(
            f"{file}: does not say how it was shown CT; write {beside.name} beside it, as in "
            f'{example}"input_range": [0, 1]}}'
        )
    if given and own:
        for key in ("orientation", "axes", "spacing_mm"):
            if getattr(given, key) != getattr(own, key):
                said = f"{key} is {getattr(own, key)} in the checkpoint and {getattr(given, key)} in {beside.name}"
                raise RunError(f"{file}: {said}; correct the latter")
    contract = given or own
    assert contract is not None
    return contract


def _of_nnssl(file: Path, plan: Mapping[str, Any]) -> Contract:
    """The contract in an nnssl checkpoint's plan: arrays are (z, y, x), and values have mean 0."""
    try:
        (configuration,) = plan["pretrain_plan"]["configurations"].values()
        spacing = configuration["spacing"]
        x, y, z = (float(mm) for mm in reversed(spacing)) if spacing else (0.0, 0.0, 0.0)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RunError(f"{file}: its {NNUNET} names no single spacing; give another start") from None
    known: dict[str, Any] = {"spacing_mm": (x, y, z) if spacing else None, "window_hu": None}
    return Contract(orientation="RAS", axes="zyx", **known)


def _shown_alike(
    file: Path, architecture: Architecture, contract: Contract, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights for input in [-1, 1]. Raises `RunError` where they cannot be made so.

    What a normalisation follows at once sees neither scale nor offset; SwinUNETR's patches are embedded without one,
    and without padding, so that a linear change of their input is one of weight and bias.
    """
    low, high = contract.input_range
    if contract.window_hu is None or (low, high) == INPUT:
        if contract.window_hu is None and architecture in ("swin_unetr", "segresnet"):
            raise RunError(f"{file}: window_hu is null, but {architecture} does not normalise its input; give the HU")
        return weights
    if architecture == "segresnet":
        raise RunError(f"{file}: input_range is {low:g} to {high:g}, which segresnet cannot be brought from to -1 to 1")
    if architecture == "swin_unetr" and "swinViT.patch_embed.proj.weight" in weights:
        weight, bias = (weights[f"swinViT.patch_embed.proj.{name}"] for name in ("weight", "bias"))
        changed = {"weight": weight * (high - low) / 2, "bias": bias + weight.sum((1, 2, 3, 4)) * (high + low) / 2}
        weights = weights | {f"swinViT.patch_embed.proj.{name}": w for name, w in changed.items()}
    return weights
