"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """Return a tqdm progress bar on stderr. Takes the arguments of tqdm.

    If stderr is not a terminal, such as the log of a cluster job, the bar is updated every 30 seconds instead of ten
    times per second, because every update adds a line to the log.
    """
    if not sys.stderr.isatty():
        options |= {"mininterval": 30.0, "maxinterval": 30.0}
    bar: tqdm[Any] = tqdm(iterable, **options)
    return bar
