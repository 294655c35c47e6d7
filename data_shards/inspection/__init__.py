"""What a set of shards holds, and whether it is whole."""
