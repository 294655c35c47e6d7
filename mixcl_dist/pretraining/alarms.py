"""Logged figures of a pre-training that say it learns little, each with its cure. Imports no torch, for the report."""

from __future__ import annotations

from collections.abc import Mapping

from mixcl_dist.config import Config
from mixcl_dist.pretraining.summary import LABEL_TERM_OFF

LEAST_ANCHORS = 100
"""Label anchors of a backward pass: with 7 to 10 the label term did not fall, with some 500 it did."""
LARGEST_UNIFORMITY = -0.1
"""That of rows with a mean squared distance of 0.05, a cosine of 0.975: nothing is left to tell them apart by. Rows
spread evenly have nearly −4."""
LEAST_RANK_SHARE = 0.05
"""Effective rank as a share of the embedding's width: of 64 directions, three."""

LARGEST_EXCESS = 0.2
"""Share of a step that all other ranks wait for the slowest one, beyond what the median rank takes."""


def alarms(step: int, figures: Mapping[str, float], config: Config, *, labels: bool) -> dict[str, str]:
    """What is wrong with the figures of one log, by a short name: a line with the cure. `labels`: the budget has some.

    Collapse is looked for once the learning rate's warm-up is over, as rows first move together and then apart.
    """
    found = {}
    objective, anchors = config.objective, figures.get("voxel_label_anchors")
    if objective.voxel_label and not labels:
        found["label_term"] = LABEL_TERM_OFF
    if labels and objective.voxel_label and anchors is not None and anchors < LEAST_ANCHORS:
        found["label_anchors"] = (
            f"{anchors:.0f} label anchors a step at step {step}, and below {LEAST_ANCHORS} the "
            "label term teaches little; raise data.labelled_fraction, rows.per_view_pair or pretrain.batch_size, or "
            "set rows.min_spacing to 1"
        )
    trained = bool(objective.voxel_identity or objective.voxel_label)
    if trained and step > config.optimizer.warmup_fraction * config.pretrain.steps and _collapsed(figures, config):
        found["collapse"] = (
            f"voxel embeddings have collapsed at step {step}: effective rank {figures['effective_rank']:.1f} of "
            f"{config.network.voxel_dim}, uniformity {figures['uniformity']:.2f}; lower optimizer.learning_rate, or "
            "raise objective.voxel_identity"
        )
    if figures.get("slowest_rank_excess", 0.0) > LARGEST_EXCESS:
        data, forward = (figures[f"slowest_rank_{stage}_s"] for stage in ("data_wait", "forward"))
        where = "wait for data" if data > forward else "forward pass"
        found["straggler"] = (
            f"rank {figures['slowest_rank']:.0f} takes {100 * figures['slowest_rank_excess']:.0f} % of a step longer "
            f"than the median rank at step {step}, mostly in its {where}, and all wait for it; see its machine"
        )
    return found


def _collapsed(figures: Mapping[str, float], config: Config) -> bool:
    rank, uniformity = figures.get("effective_rank"), figures.get("uniformity")
    if rank is None or uniformity is None:
        return False
    return rank < LEAST_RANK_SHARE * config.network.voxel_dim or uniformity > LARGEST_UNIFORMITY
