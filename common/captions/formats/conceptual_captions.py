"""Conceptual Captions (`Train_GCC-training.tsv`): two columns without a header, a caption and the URL of its image.

The file name of an image is its URL without scheme and query, "host/path": images downloaded under the last part of
the URL match it if that part is unique.
"""

from __future__ import annotations

import re
from typing import ClassVar

from gridcap.common.captions.records import CaptionSet, Problems
from gridcap.common.captions.rows import RowColumns, read_rows
from gridcap.common.captions.source import CaptionsFile

URL = re.compile(r"https?://\S+$")
COLUMNS = RowColumns("url", ("caption",))


class ConceptualCaptions:
    """Conceptual Captions TSV, with the columns in either order."""

    name: ClassVar[str] = "Conceptual Captions TSV"
    example: ClassVar[str] = "caption<TAB>URL, no header"

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether the first line consists of a URL and another text, separated by a tab."""
        if not file.is_text:
            return False
        first = next((line for line in file.text[:4096].split("\n") if line.strip()), "")
        cells = first.strip().split("\t")
        return len(cells) == 2 and sum(bool(URL.match(cell.strip())) for cell in cells) == 1

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read all images; the file has one part."""
        problems = Problems()
        rows = []
        for number, line in enumerate(file.text.split("\n"), 1):
            cells = line.strip().split("\t")
            urls = [URL.match(cell.strip()) is not None for cell in cells]
            if len(cells) == 2 and sum(urls) == 1:
                rows.append((f"line {number}", {"url": cells[urls.index(True)], "caption": cells[urls.index(False)]}))
            elif line.strip():
                problems.add("line that is not a caption and a URL", f"line {number}")
        loaded = read_rows(rows, COLUMNS, file, problems)
        return CaptionSet(loaded.records, problems)


FORMAT = ConceptualCaptions()
