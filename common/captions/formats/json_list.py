"""JSON lists of objects, also those of TextCaps (`{"data": [...]}`) and AI Challenger (captions in a list)."""

from __future__ import annotations

from typing import Any, ClassVar

from gridcap.common.captions.records import CaptionSet, Problems
from gridcap.common.captions.rows import find_columns, missing_columns, read_rows
from gridcap.common.captions.source import CaptionsFile

LIST_KEYS = ("data", "annotations", "captions")


class JsonList:
    """A JSON list of objects with an image and one or several captions."""

    name: ClassVar[str] = "JSON list, also TextCaps, AI Challenger"
    example: ClassVar[str] = '[{"image": "a.jpg", "caption": "..."}]'

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether the JSON is a list of objects, or an object with such a list and no list of images."""
        return bool(_entries(file.tree))

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read the objects of a part."""
        return read_objects([(f"entry {i}", entry) for i, entry in enumerate(_entries(file.tree))], file, Problems())


def read_objects(entries: list[tuple[str, Any]], file: CaptionsFile, problems: Problems) -> CaptionSet:
    """Read (position, parsed JSON) pairs; values that are not objects are counted as problems.

    Raises:
        AnnotationError: no image column or caption column is recognized, or a file name leaves the image folder.
    """
    rows = []
    names: dict[str, None] = {}
    for position, entry in entries:
        if isinstance(entry, dict):
            rows.append((position, entry))
            names.update(dict.fromkeys(entry))
        else:
            problems.add("entry that is not an object", position)
    columns = find_columns(list(names), file.columns)
    if columns is None:
        raise missing_columns(file, list(names))
    return read_rows(rows, columns, file, problems)


def _entries(tree: Any) -> list[Any]:
    """Return the list of objects in parsed JSON; empty if there is none."""
    if isinstance(tree, dict) and "images" not in tree:
        tree = next((tree[key] for key in LIST_KEYS if isinstance(tree.get(key), list)), None)
    if isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        return tree
    return []


FORMAT = JsonList()
