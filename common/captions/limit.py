"""The limit on invalid items in a captions file or an image folder."""

from __future__ import annotations

from pathlib import Path

from gridcap.common.captions.records import Problems
from gridcap.common.config import max_invalid_count
from gridcap.common.errors import AnnotationError


def check_invalid(source: Path, problems: Problems, valid: int, max_invalid: str, remedy: str = "fix the file") -> None:
    """Raise an error if there are more invalid items than allowed.

    Args:
        source: the captions file or image folder, for messages.
        problems: the invalid items.
        valid: number of valid items.
        max_invalid: limit, such as "10" or "5%" of all items.
        remedy: what to do about invalid items, for the hint.

    Raises:
        AnnotationError: too many invalid items.
    """
    invalid, total = problems.total, valid + problems.total
    if invalid <= max_invalid_count(max_invalid, total):
        return
    if 2 * invalid > total:  # a higher limit would not help: this is not the intended file
        hint = f"{remedy}, or check that this is the intended file"
    else:
        hint = f"{remedy}, or raise the limit with --set data.max_invalid={invalid}"
    raise AnnotationError(
        f"{source}: {invalid} of {total} items are invalid (limit {max_invalid}): {'; '.join(problems.lines())}", hint
    )
