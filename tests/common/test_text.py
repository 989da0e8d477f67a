from __future__ import annotations

import pytest

from gridcap.common.text import escape_line, plural


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (82783, "82,783 shards")]
)
def test_plural_follows_the_count(count: int, expected: str) -> None:
    assert plural(count, "shard") == expected


def test_plural_takes_an_irregular_form() -> None:
    assert plural(2, "batch", "batches") == "2 batches"
    assert plural(1, "batch", "batches") == "1 batch"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("photos/a b.jpg", "photos/a b.jpg"),
        ("é 猫.jpg", "é 猫.jpg"),
        ("a\tb\nc\rd.jpg", r"a\tb\nc\rd.jpg"),
        ("a\u2028b\x85c\x1b[31m", r"a\u2028b\x85c\x1b[31m"),
        ("caf\udce9.jpg", r"caf\udce9.jpg"),
        (r"a\tb", r"a\\tb"),
    ],
)
def test_item_26_escape_line_returns_one_field_of_one_line(text: str, expected: str) -> None:
    assert escape_line(text) == expected
    assert len(escape_line(text).splitlines()) == 1
