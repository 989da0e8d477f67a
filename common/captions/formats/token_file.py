"""Token files of Flickr8k and Flickr30k (`Flickr8k.token.txt`, `results_20130124.token`).

Each line is `name.jpg#0<TAB>caption`. The lists `Flickr_8k.trainImages.txt`, `.devImages.txt`, and `.testImages.txt` in
the same folder are the parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar

from gridcap.common.captions.records import CaptionSet, Problems
from gridcap.common.captions.rows import RowColumns, is_of_part, read_rows
from gridcap.common.captions.source import CaptionsFile, decode
from gridcap.common.errors import AnnotationError

LINE = re.compile(r"([^\t]+\.\w+)#\d+\t(.*)")
LISTS = ("train", "dev", "test")
COLUMNS = RowColumns("name", ("caption",), "split")


class TokenFile:
    """Flickr token file."""

    name: ClassVar[str] = "Flickr8k and Flickr30k token file"
    example: ClassVar[str] = "name.jpg#0<TAB>caption"

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether the first line is a name with a number, a tab, and a caption."""
        if not file.is_text:
            return False
        first = next((line for line in file.text[:4096].split("\n") if line.strip()), "")
        return LINE.match(first) is not None

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read the images of a part: those of its list in the same folder, or all if there are no lists."""
        problems = Problems()
        part_of = _read_lists(file)
        columns = COLUMNS if part_of else RowColumns("name", ("caption",))
        loaded = read_rows(_rows(file, part_of, problems), columns, file, problems)
        return CaptionSet(loaded.records, problems)


def _rows(
    file: CaptionsFile, part_of: Mapping[str, str], problems: Problems
) -> Iterator[tuple[str, Mapping[str, str]]]:
    for number, line in enumerate(file.text.split("\n"), 1):
        if not line.strip():
            continue
        match = LINE.match(line.rstrip("\r"))
        if match is None:
            problems.add("line that is not name#number, tab, caption", f"line {number}")
        else:
            yield f"line {number}", {"name": match[1], "caption": match[2], "split": part_of.get(match[1], "")}


def _read_lists(file: CaptionsFile) -> dict[str, str]:
    """Return file name -> part, from the lists next to the file."""
    part_of: dict[str, str] = {}
    for part in LISTS:
        for path in sorted(file.path.parent.glob(f"*.{part}Images.txt")):
            for name in decode(path.read_bytes(), path).split():
                other = part_of.setdefault(name, part)
                if other != part:
                    raise AnnotationError(f"{path}: {name} is also in the list of {other}", "fix the lists")
    if part_of and not any(is_of_part(part, file.part) for part in part_of.values()):
        return {}  # another name of a split selects all images
    return part_of


FORMAT = TokenFile()
