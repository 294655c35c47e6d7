"""Many trials, and what they say."""
