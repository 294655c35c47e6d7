"""Hand a pre-trained or fine-tuned network to the tools that the field uses."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from mixcl_dist.export import bundle, huggingface, monai, nnunet, onnx
from mixcl_dist.export.trained import ExportError, open_trained

_WRITERS = {
    "monai": monai.write,
    "nnunet": nnunet.write,
    "bundle": bundle.write,
    "hf": huggingface.write,
    "onnx": onnx.write,
}


def export(
    run: Path,
    to: Literal["monai", "nnunet", "bundle", "hf", "onnx"],
    out: Path,
    *,
    licence: str | None = None,
    table: Path | None = None,
) -> Path:
    """Write the network of a finished RUN folder to the new folder `out` and return it.

    monai: weights and arguments of the public network; bundle: a MONAI bundle that segments; hf: a Hugging Face model
    folder; nnunet: a checkpoint that nnU-Net fine-tunes from; onnx: a graph that segments, for any runtime. Each has a
    README.md with data, protocol and limits, with the `licence` of the weights where it is known, and with what was
    found by the few-label table or study in `table`, or in which the run lies.
    The folder appears whole or not at all. Raises `ExportError` or `RunError`, each one line with the cure.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; give a new folder")
    trained = open_trained(run, licence, table)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _WRITERS[to](trained, temporary)
        temporary.rename(out)
    except OSError as error:
        raise ExportError(f"{out}: {error.strerror}; give a folder that you may write, with room") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
