"""The feature store: shards, index, and reader."""
