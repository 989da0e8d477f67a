"""Reading a captions file of any supported format."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from functools import cache
from pathlib import Path

from gridcap.common.captions import formats
from gridcap.common.captions.records import CaptionSet
from gridcap.common.captions.source import CaptionsFile, CaptionsFormat, Columns
from gridcap.common.errors import AnnotationError
from gridcap.common.text import escape_line

SHOWN_LINES, SHOWN_CHARACTERS = 3, 100


@cache
def captions_formats() -> tuple[CaptionsFormat, ...]:
    """Return all supported formats: `FORMAT` of each module of `gridcap.common.captions.formats`."""
    names = sorted(module.name for module in pkgutil.iter_modules(formats.__path__))
    return tuple(importlib.import_module(f"{formats.__name__}.{name}").FORMAT for name in names)


def read_captions(path: Path, part: str = "train", columns: Columns | None = None) -> CaptionSet:
    """Read a captions file. The format is detected from its content.

    Args:
        path: the file; see docs/captions.md for the supported formats.
        part: part of a file that contains several (Karpathy, a split column, Flickr8k): train, val, or test, or a
            value of the split column; a leading "karpathy-" is ignored. Train includes Karpathy's restval.
        columns: columns of a table, JSON list, or Parquet file; None: by their names.

    Raises:
        AnnotationError: unreadable file or unsupported format.
    """
    file = CaptionsFile(path, part, columns or Columns())
    for captions_format in captions_formats():
        if captions_format.sniff(file):
            return replace(captions_format.read(file), format=captions_format.name)
    raise _unsupported(file)


def _unsupported(file: CaptionsFile) -> AnnotationError:
    names = "; ".join(f"{captions_format.name} ({captions_format.example})" for captions_format in captions_formats())
    lines = [] if file.path.is_dir() else [line for line in file.text.splitlines() if line.strip()][:SHOWN_LINES]
    shown = " / ".join(escape_line(line[:SHOWN_CHARACTERS]) for line in lines) or "(nothing)"
    return AnnotationError(
        f"{file.path}: unsupported captions format {file.suffix or '(no extension)'}; it begins with: {shown}",
        f"supported formats: {names}",
    )
