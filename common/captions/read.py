"""Reading a captions file of any supported format."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

from gridcap.common.captions.coco import read_coco
from gridcap.common.captions.karpathy import is_karpathy, read_karpathy
from gridcap.common.captions.records import CaptionSet
from gridcap.common.captions.table import read_table
from gridcap.common.errors import AnnotationError

SUPPORTED = "use COCO captions JSON, a Karpathy split file (dataset_*.json), or CSV with the columns image,caption"
TABLE_SUFFIXES = (".csv", ".txt")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


def read_captions(path: Path, part: str = "train") -> CaptionSet:
    """Read a captions file. The format is detected from its name and content.

    Args:
        path: COCO captions JSON, a Karpathy split file, or a CSV file with the columns image,caption.
        part: part of a Karpathy split file: train (includes restval), val, or test; a leading "karpathy-" is ignored.

    Raises:
        AnnotationError: unreadable file or unsupported format.
    """
    text = _read_text(path)
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return read_table(text, path)
    is_json = suffix == ".json" or text.lstrip()[:1] in ("{", "[")
    if not is_json or suffix in JSON_LINES_SUFFIXES:
        raise AnnotationError(f"{path}: unsupported captions format {suffix or '(no extension)'}", SUPPORTED)
    tree = _parse_json(text, path)
    if is_karpathy(tree):
        return read_karpathy(tree, path, part)
    return read_coco(tree, path)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}", "check the path of the captions file") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = _guess_encoding(content)
        if encoding is None:
            raise AnnotationError(f"{path}: not a text file (byte {error.start} is not UTF-8)", SUPPORTED) from error
        raise _encoding_error(path, encoding) from error
    if "\0" in text[:4]:  # ASCII characters encoded as UTF-16 are valid UTF-8
        raise _encoding_error(path, "UTF-16")
    return text


def _guess_encoding(content: bytes) -> str | None:
    """Guess the encoding of text that is not UTF-8; None if it is not text."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:2]:
        return "UTF-16"
    controls = set(range(32)) - set(b"\t\n\f\r")
    return None if controls & set(content) else "CP1252"


def _encoding_error(path: Path, encoding: str) -> AnnotationError:
    name = {"CP1252": "probably CP1252 (Windows) or Latin-1"}.get(encoding, encoding)
    return AnnotationError(
        f"{path}: not UTF-8 text; the encoding is {name}",
        f"convert the file: iconv -f {encoding} -t UTF-8 {quote(path.name)} > {quote('utf8_' + path.name)}",
    )


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    """Parse JSON that contains a list of images, as COCO and Karpathy files do."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise AnnotationError(
            f"{path}: not valid JSON: {position}", "if the file is truncated, download or write it again"
        ) from error
    except (ValueError, RecursionError) as error:  # an integer with thousands of digits, or deep nesting
        raise AnnotationError(f"{path}: not valid JSON: {error}", SUPPORTED) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("images"), list):
        raise AnnotationError(
            f"{path}: no list of images: neither a COCO captions file nor a Karpathy split file", SUPPORTED
        )
    return tree
