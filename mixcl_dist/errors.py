"""What the application refuses."""


class MixclError(ValueError):
    """Something that whoever called can mend; the message is one line: what, where, and the cure."""
