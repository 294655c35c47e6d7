"""What is refused: `REFUSALS` is all of it, whichever room says so."""

from mixcl_dist.cluster.errors import ClusterError
from mixcl_dist.data_shards.errors import DataError


class MixclError(ValueError):
    """Something that whoever called can mend; the message is one line: what, where, and the cure."""


class RunError(MixclError):
    """A run's, study's or table's folder, or a file in it, that cannot be used."""


REFUSALS = (MixclError, DataError, ClusterError)
"""One base class for each room that refuses; any other exception is a defect."""
