"""Build shards, pre-train on them with the labels of one scan, and fine-tune: `python pretrain_and_finetune.py OUT`."""

import sys
from pathlib import Path

from mixcl_dist.config import load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining.pretrain import pretrain

SETTINGS = {
    "build.patch_size": "24,24,24",
    "network.filters": "4,8,16",
    "views.size": "16,16,16",
    "rows.per_view_pair": "32",
    "budget.scans": "1",
    "pretrain.steps": "10",
    "pretrain.batch_size": "4",
    "finetune.steps": "10",
    "finetune.patch_size": "24,24,24",
}
"""As on the command line (`--pretrain.steps 10`), and far too few steps to learn anything."""


def main(out: Path) -> None:
    config = load(overrides=list(SETTINGS.items()))
    # The first source is the data set to fine-tune on, partly annotated; the other has no labels.
    labelled, unlabelled = write_cohort(
        out / "ct", training=4, validation=2, unlabelled=2, size=(40, 34, 40), spacing_mm=9.0
    )
    result = build([labelled, unlabelled], out / "shards", config.build)
    print(f"{result.manifest.patches} patches of {len(result.manifest.cases)} cases")
    pretrain(config, shards=out / "shards", run=out / "pretrained")
    for start in (out / "pretrained", None):
        scores = finetune(config, data=labelled, start=start, run=out / ("few" if start else "scratch"))
        print(f"from {start.name if start else 'scratch'}: mean Dice {scores.mean}")


if __name__ == "__main__":  # the stream's workers import this file
    main(Path(sys.argv[1]))
