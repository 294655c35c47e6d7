"""What lies on disk: codec, shard, manifest, fingerprint."""
