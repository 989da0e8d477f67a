"""Stage one: images -> grid features -> shards."""
