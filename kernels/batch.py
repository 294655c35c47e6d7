"""The rows of one call, from the operator to what computes it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mixcl_dist.kernels.distributed import Alone, Peers, join


class Batch(NamedTuple):
    """Arguments as :func:`mixcl_dist.kernels.mixed_contrastive_loss` takes them."""

    embeddings: Tensor
    identity: Tensor
    candidate_set: Tensor
    set_table: Tensor
    group: Tensor | None
    temperature: Tensor  #: 0-d, of the dtype that is computed in
    row_weight: Tensor | None
    present: Tensor | None
    weights: tuple[float, float]  #: of the identity and of the label relation

    def join(self, process_group: str, sweep: str, **same: object) -> Alone | Peers:
        """Meet the processes of a group, which all have to have the same settings."""
        same |= {
            "pass": sweep,
            "set_table": self.set_table,
            "temperature": self.temperature,
            "identity_weight": self.weights[0],
            "label_weight": self.weights[1],
            "group": "None" if self.group is None else "given",
            "present": "None" if self.present is None else "given",
        }
        return join(process_group, self.embeddings, same)

    def contiguous(self) -> Batch:
        """The same, of which all but the embeddings are laid out as kernels read them."""
        given: dict[str, Any] = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**{name: value.contiguous() for name, value in given.items() if name != "embeddings"})

    def only(self, rows: Tensor) -> Batch:
        """These rows of the batch, all present."""
        of_rows = ("embeddings", "identity", "candidate_set", "group", "row_weight")
        chosen = {name: value[rows] for name in of_rows if (value := getattr(self, name)) is not None}
        return self._replace(**chosen, present=None)
