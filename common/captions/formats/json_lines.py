"""JSON Lines: one object per line."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from gridcap.common.captions.formats.json_list import read_objects
from gridcap.common.captions.records import CaptionSet, Problems
from gridcap.common.captions.source import JSON_LINES_SUFFIXES, CaptionsFile


class JsonLines:
    """JSON Lines with an image and one or several captions per line."""

    name: ClassVar[str] = "JSON Lines"
    example: ClassVar[str] = '.jsonl: one {"image": "a.jpg", "caption": "..."} per line'

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether the file has the extension of JSON Lines and begins with an object."""
        return file.is_text and file.suffix in JSON_LINES_SUFFIXES and file.text.lstrip()[:1] == "{"

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read the lines of a part; lines that are not JSON are counted as problems."""
        problems = Problems()
        entries: list[tuple[str, Any]] = []
        for number, line in enumerate(file.text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                entries.append((f"line {number}", json.loads(line)))
            except (ValueError, RecursionError):
                problems.add("line that is not valid JSON", f"line {number}")
        return read_objects(entries, file, problems)


FORMAT = JsonLines()
