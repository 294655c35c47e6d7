"""`mixcl benchmark` from a checkout: a pre-training step by part, on your shards or, by --quick, on a phantom's.

    python benchmarks/step/run.py --out OUT --data SHARDS --config my.yaml --trace OUT/trace.json
    python benchmarks/step/run.py --out OUT --quick                     a phantom's shards and a tiny network

All other options are those of `mixcl benchmark --help`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mixcl_dist.cli import main as mixcl
from mixcl_dist.config import load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.phantom import write_cohort
from mixcl_dist.profiling.result import Result

TINY = {
    "build.patch_size": "20,20,20", "network.filters": "4,4,4", "network.voxel_dim": "8", "network.crop_dim": "8",
    "views.size": "16,16,16", "rows.per_view_pair": "32", "pretrain.batch_size": "2", "data.workers": "1",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {Result.FILE}")
    parser.add_argument("--quick", action="store_true", help="three steps, and without --data a phantom")
    options, own = parser.parse_known_args()
    if "--data" not in own and not options.quick:
        parser.error("give --data SHARDS, as `mixcl shards build` makes them, or --quick")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        quick = ["--seconds", "0"] if options.quick else []
        subject = [] if "--data" in own else phantom(Path(folder))
        return mixcl(["benchmark", "--out", str(options.out / Result.FILE), *subject, *quick, *own])


def phantom(folder: Path) -> list[str]:
    """Options of shards that are made in a folder, and of a network for them."""
    cohort = write_cohort(folder / "cohort", training=2, validation=1, unlabelled=0, size=(24, 24, 24), spacing_mm=14)
    build(cohort[:1], folder / "shards", load(overrides=list(TINY.items())).build)
    return ["--data", str(folder / "shards"), *(word for key, value in TINY.items() for word in (f"--{key}", value))]


if __name__ == "__main__":
    sys.exit(main())
