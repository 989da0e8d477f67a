"""Stage two: shards -> decoder -> captions."""
