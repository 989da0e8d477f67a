"""Text helpers for messages."""

from __future__ import annotations

import re


def plural(count: int, noun: str, plural_noun: str | None = None) -> str:
    """Return a count with its noun in the right number: "1 shard", "2,048 shards".

    Args:
        count: number of items.
        noun: singular form.
        plural_noun: plural form, if it is not the singular with an "s".
    """
    return f"{count:,} {noun if count == 1 else plural_noun or noun + 's'}"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes, or hours: "42 s", "14 min", "2.5 h"."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


_LINE_BREAKING = re.compile("[\\\\\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def escape_line(text: str) -> str:
    r"""Return text that fits into one field of a tab-separated line.

    Control characters, line separators, lone surrogates, and backslashes are replaced by escape sequences as in Python
    string literals, for example a tab by ``\t``.
    """
    return _LINE_BREAKING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
