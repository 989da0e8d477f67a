"""Building blocks of fault injection: parts, checks, and comparison of folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class FailedError(Exception):
    """A fault was not handled correctly; the message states which and how."""


@dataclass(frozen=True)
class Part:
    """One kind of fault.

    Attributes:
        fault: short description for the table.
        cases, quick: number of cases in a full and in a quick run.
        prepare: writes the files that all cases need to a folder; called once.
        run: runs one case in the prepared folder with its random numbers and returns a short outcome. Raises
            FailedError if the fault was not handled; any other exception is a failure too.
        missing: returns what this machine lacks to run the part, or an empty string.
    """

    fault: str
    cases: int
    quick: int
    prepare: Callable[[Path], object]
    run: Callable[[Path, np.random.Generator], str]
    missing: Callable[[], str] = lambda: ""


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fresh_copy(folder: Path) -> Path:
    """Copy the subfolder `base` to `work`, where a case may modify it, and return that path."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "base", work)
    return work


def require(condition: bool, message: str) -> None:
    """Raise FailedError if the condition is false."""
    if not condition:
        raise FailedError(message)


def corrupt(content: bytes, rng: np.random.Generator, truncate: bool) -> bytes:
    """Return the content with one bit flipped, or truncated."""
    if not content or truncate:
        return content[: int(rng.integers(len(content)))] if content else content
    changed = bytearray(content)
    changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)
