"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """tqdm's bar on stderr, with its arguments.

    Where stderr is no terminal but a log, of a cluster's job say, it is drawn every 30 seconds and not ten times a
    second: each drawing stays in the file.
    """
    if not sys.stderr.isatty():
        options |= {"mininterval": 30.0, "maxinterval": 30.0}
    bar: tqdm[Any] = tqdm(iterable, **options)
    return bar
