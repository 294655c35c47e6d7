"""Shards → batches, exact after any stop."""
