"""Volumes → shards: restartable, appending, parallel."""
