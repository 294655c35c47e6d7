"""The whole path on a phantom cohort: volumes → shards → pre-training → few-label trials → report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixcl_dist.config import Config, replace
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.networks.dynunet import check_size
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining.pretrain import check_sizes, pretrain
from mixcl_dist.progress import ProgressReport
from mixcl_dist.report import study_table, write_report
from mixcl_dist.run import RunError
from mixcl_dist.studies.study import run_study

TRAINING, VALIDATION, UNLABELLED = 20, 5, 24


def demo(config: Config, out: Path) -> None:
    """Run every stage in the folder `out`, print the Dice table and where the report is."""
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: is not empty; remove it, or give another --out")
    check_sizes(config, config.build.patch_size)
    check_size("finetune.patch_size", config.network, config.finetune.patch_size)
    with _stage(1, "phantom CT: three sites, two of which annotate different organs, one none"):
        sources = write_cohort(out / "ct", training=TRAINING, validation=VALIDATION, unlabelled=UNLABELLED)
    with _stage(2, "shards of patches"):
        build(sources, out / "shards", config.build, ProgressReport("build"))
    starts = {seed: out / f"pretrained-s{seed}" for seed in config.study.seeds}
    with _stage(3, f"pre-training for each subset of labelled cases, {config.pretrain.steps} steps"):
        for seed, run in starts.items():
            pretrain(replace(config, {"budget.seed": seed}), shards=out / "shards", run=run)
    with _stage(4, "few-label trials: pre-trained against scratch"):
        run_study(config, data=sources[0], starts=list(starts.values()), study=out / "study")
    with _stage(5, "report"):
        page = write_report(out / "study")
    print(study_table(out / "study"))
    print(f"report: {page.resolve()}")


@contextmanager
def _stage(number: int, title: str) -> Iterator[None]:
    print(f"[{number}/5] {title}", file=sys.stderr, flush=True)
    start = time.monotonic()
    yield
    print(f"[{number}/5] done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
