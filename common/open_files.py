"""The limit of open files of this process."""

from __future__ import annotations

import resource
import sys

MAX_OPEN_FILES = 8192  # more than any command needs, and accepted by every system
_INITIAL_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def initial_open_file_limit() -> int:
    """Return the soft limit that this process was started with, which other programs have too."""
    return sys.maxsize if _INITIAL_LIMIT == resource.RLIM_INFINITY else _INITIAL_LIMIT


def open_file_limit() -> int:
    """Return the soft limit of open files of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def raise_open_file_limit() -> int:
    """Raise the soft limit of open files as far as the hard limit allows, up to MAX_OPEN_FILES.

    Returns:
        The soft limit in effect.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        except (OSError, ValueError):  # some systems accept less than they report
            return soft
        return target
    return open_file_limit()
