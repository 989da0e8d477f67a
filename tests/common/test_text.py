from __future__ import annotations

import pytest

from gridcap.common.text import plural


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (82783, "82,783 shards")]
)
def test_plural_follows_the_count(count: int, expected: str) -> None:
    assert plural(count, "shard") == expected


def test_plural_takes_an_irregular_form() -> None:
    assert plural(2, "batch", "batches") == "2 batches"
    assert plural(1, "batch", "batches") == "1 batch"
