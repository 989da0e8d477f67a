"""Text helpers for messages."""

from __future__ import annotations


def plural(count: int, noun: str, plural_noun: str | None = None) -> str:
    """Return a count with its noun in the right number: "1 shard", "2,048 shards".

    Args:
        count: number of items.
        noun: singular form.
        plural_noun: plural form, if it is not the singular with an "s".
    """
    return f"{count:,} {noun if count == 1 else plural_noun or noun + 's'}"
