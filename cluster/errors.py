"""What this room refuses."""


class ClusterError(ValueError):
    """A group, machine or state that whoever called can mend; the message is one line: what, where, and the cure."""


class EngineError(ClusterError):
    """Ranks that do not fit together, or a state that cannot be taken up; the message is one line with the cure."""
