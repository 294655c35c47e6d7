"""What this room refuses."""


class ClusterError(ValueError):
    """A group, machine or state that whoever called can mend; the message is one line: what, where, and the cure."""
