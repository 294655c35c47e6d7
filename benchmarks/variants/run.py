"""Which variant of pre-training gives better features? Each differs from the base in one thing, is pre-trained for a
while and judged by the frozen probe on development scans. What is done is not done again: run it as often as you like.

    mixcl shards build OPENKBP/dataset.json --out SHARDS --recipe few_label
    python benchmarks/variants/run.py --shards SHARDS --out OUT [--only NAME …] [--steps 400] [--batch-size 4]
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mixcl_dist.records import METRICS, PretrainRecord, ProbeRecord, read_metrics
from mixcl_dist.run import machine
from mixcl_dist.studies.ledger import digest_of
from mixcl_dist.studies.table.runner import ROOT, SOURCES

LABELLED = {"budget.scans": "4", "data.labelled_fraction": "0.5", "objective.voxel_label": "1"}
OFF = {f"objective.{term}": "0" for term in ("voxel_identity", "voxel_label", "crop_identity", "reconstruction")}
IDENTITY = OFF | {"objective.voxel_identity": "1"}
RECONSTRUCTION = OFF | {"objective.reconstruction": "1"}
BOTH = IDENTITY | {"objective.reconstruction": "1"}
VARIANTS: dict[str, dict[str, str]] = {
    "identity": IDENTITY,
    "identity, temperature 0.05": IDENTITY | {"objective.voxel_temperature": "0.05"},
    "identity, temperature 0.2": IDENTITY | {"objective.voxel_temperature": "0.2"},
    "identity, half the rows": IDENTITY | {"rows.per_view_pair": "128"},
    "identity, no clipping": IDENTITY | {"engine.gradient_clipping": "0"},
    "identity, milder views": IDENTITY | {"views.mask_fraction": "0.3"},
    "identity and crops": IDENTITY | {"objective.crop_identity": "0.25"},
    "reconstruction": RECONSTRUCTION,
    "reconstruction, squares": RECONSTRUCTION | {"objective.reconstruction_beta": "1"},
    "reconstruction, mask 0.3": RECONSTRUCTION | {"views.mask_fraction": "0.3"},
    "identity and reconstruction": BOTH,
    "identity and 10 × reconstruction": BOTH | {"objective.reconstruction": "10"},
    "labels of 4 scans": OFF | LABELLED,
    "labels of 4 scans, identity": IDENTITY | LABELLED,
    "labels of 4 scans, identity, reconstruction": BOTH | LABELLED,
    "labels of 4 scans, identity, every scan alike": IDENTITY | LABELLED | {"data.labelled_fraction": "null"},
    "labels of 4 scans, identity, spacing 2": IDENTITY | LABELLED | {"rows.min_spacing": "2"},
}
"""Name → settings beside the recipe `few_label`."""
SOURCES_DIGEST = digest_of(ROOT, (*SOURCES["pretrain"], *SOURCES["probe"], "recipes/few_label.yaml"))
"""Rows of other sources stay in the table, but are not taken for these."""
LOGGED = ("voxel_identity", "voxel_label", "reconstruction", "voxel_label_anchors", "gradient_norm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="made with the recipe few_label")
    parser.add_argument("--out", type=Path, required=True, help="folder; variants.csv in it has a row for each variant")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only if not is_done(name, options) and not measure(name, options)]
    print(table(options.out))
    for name in failed:
        print(f"{name}: failed, see above", file=sys.stderr)
    return 1 if failed else 0


def is_done(name: str, options: argparse.Namespace) -> bool:
    """Whether there is a row of these settings and of the sources as they are now."""
    key = {"variant": name, **asked(options), "settings": spelled(name), "sources": SOURCES_DIGEST}
    return any(key.items() <= row.items() for row in rows(options.out))


def asked(options: argparse.Namespace) -> dict[str, str]:
    return {"steps": str(options.steps), "batch_size": str(options.batch_size), "seed": str(options.seed)}


def spelled(name: str) -> str:
    return " ".join(f"{key}={value}" for key, value in VARIANTS[name].items())


def measure(name: str, options: argparse.Namespace) -> bool:
    """Pre-train and probe one variant, and append its row; false where that failed."""
    run = options.out / "runs" / "-".join([*name.replace(",", "").split(), *asked(options).values()])
    shutil.rmtree(run, ignore_errors=True)
    settings = VARIANTS[name] | {
        "pretrain.steps": str(options.steps),
        "pretrain.batch_size": str(options.batch_size),
        "pretrain.seed": str(options.seed),
        "pretrain.probe_every": str(options.steps),
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command = ["pretrain", "--data", options.shards, "--run", str(run), "--recipe", "few_label", *words]
    print(f"\n{name}", file=sys.stderr, flush=True)
    if subprocess.run([sys.executable, "-m", "mixcl_dist", *command], check=False).returncode:
        return False
    probe, last, facts = ProbeRecord.load(run), read_metrics(run / METRICS)[-1], PretrainRecord.load(run)
    row = {"variant": name, **asked(options)}
    row |= {"linear": probe.linear.mean, "knn": probe.knn.mean}
    row |= {f"linear_{key}": value for key, value in probe.linear.dice.items()}
    row |= {key: last.get(key, "") for key in LOGGED}
    here = machine()
    row |= {"seconds": round(facts.seconds), "machine": here.gpu or f"{here.cpu}, {os.cpu_count()} cores"}
    row |= {"settings": spelled(name), "sources": SOURCES_DIGEST}
    append(options.out / "variants.csv", row)
    return True


def append(path: Path, row: dict) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def rows(out: Path) -> list[dict[str, str]]:
    path = out / "variants.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(out: Path) -> str:
    lines = [f"{'variant':<48} {'steps':>6} {'batch':>6} {'linear':>7} {'k-NN':>7}"]
    for row in sorted(rows(out), key=lambda row: -float(row["linear"])):
        figures = f"{float(row['linear']):>7.3f} {float(row['knn']):>7.3f}"
        lines.append(f"{row['variant']:<48} {row['steps']:>6} {row['batch_size']:>6} {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
