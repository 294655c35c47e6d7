"""What this room refuses."""


class DataError(ValueError):
    """Data that whoever called can mend; the message is one line: what, where, and the cure."""
