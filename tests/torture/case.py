"""What the parts of the torture share: a numbered case, what is judged, and how a folder is compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class FailedError(Exception):
    """Something was not survived; the message says what and how."""


@dataclass(frozen=True)
class Part:
    """One kind of fault.

    Attributes:
        fault: in a few words, for the table.
        cases, quick: how many there are, and how many in a quick run.
        prepare: makes in a folder what the cases need, once.
        run: one case of a prepared folder, by its random numbers; gives the outcome in a few words.
            Raises FailedError if the fault was not survived; any other exception is a failure too.
        missing: says what this machine lacks for it; nothing if it can be run.
    """

    fault: str
    cases: int
    quick: int
    prepare: Callable[[Path], object]
    run: Callable[[Path, np.random.Generator], str]
    missing: Callable[[], str] = lambda: ""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fresh_copy(folder: Path) -> Path:
    """`base` below a folder, copied to `work` beside it, where a case may change it."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "base", work)
    return work


def require(condition: bool, what: str) -> None:
    """Raise FailedError unless it holds."""
    if not condition:
        raise FailedError(what)


def damaged(content: bytes, rng: np.random.Generator, cut: bool) -> bytes:
    """The content with one bit flipped, or without its end."""
    if not content or cut:
        return content[: int(rng.integers(len(content)))] if content else content
    changed = bytearray(content)
    changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)
