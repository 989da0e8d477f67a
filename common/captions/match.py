"""Matching images with captions to the rows of a feature store."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gridcap.common.captions.match_files import without_suffix
from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.store.reader import FeatureStore

NAMES_PER_READ = 1 << 14


@dataclass(frozen=True)
class Matches:
    """The rows of images with captions.

    Attributes:
        rows: row of each record; None for records without a row.
        ambiguous: position -> explanation, for records whose file name matches several rows, or a row that another
            record matches at least as well.
    """

    rows: list[int | None]
    ambiguous: dict[int, str]


def match_rows(store: FeatureStore, records: Sequence[ImageRecord]) -> Matches:
    """Match records to rows by image id, then by file name.

    Names count only if the ids of either side were derived from names (a store extracted without captions, or a CSV
    file): two sources with ids of their own that disagree describe different data sets. "a.jpg" and "train/a.jpg"
    match, as do "a" and "a.jpg"; "val/a.jpg" and "train/a.jpg" do not. Equal names take precedence over names of which
    one ends with the other.

    Args:
        store: feature store.
        records: images with captions.
    """
    rows: list[int | None] = []
    for record in records:
        try:
            rows.append(store.row_of_image(record.image_id))
        except KeyError:
            rows.append(None)
    named_store = _has_ids_from_names(store)
    unmatched = [
        i
        for i, (row, record) in enumerate(zip(rows, records, strict=True))
        if row is None and (named_store or record.image_id == id_from_name(record.file_name))
    ]
    ambiguous: dict[int, str] = {}
    aliases: set[int] = set()  # records whose name is not equal to that of their row
    for i, candidates in _rows_by_name(store, records, unmatched).items():
        exact = [row for row, name in candidates if name == records[i].file_name]
        choices = exact or [row for row, _ in candidates]
        if len(choices) == 1:
            rows[i] = choices[0]
            if not exact:
                aliases.add(i)
        else:
            names = " or ".join(name for _, name in candidates[:2])
            ambiguous[i] = f"{records[i].file_name} may be {names}"
    all_matches = Counter(row for row in rows if row is not None)
    exact_matches = Counter(row for i, row in enumerate(rows) if row is not None and i not in aliases)
    matched = list(rows)
    for i in unmatched:
        row = rows[i]
        if row is not None and (all_matches if i in aliases else exact_matches)[row] > 1:
            other = next(records[j].file_name for j, match in enumerate(matched) if match == row and j != i)
            ambiguous[i] = f"{records[i].file_name} and {other} both match {store.file_name[row]}"
            rows[i] = None
    return Matches(rows, ambiguous)


def find_same_name(store: FeatureStore, records: Sequence[ImageRecord]) -> tuple[ImageRecord, int] | None:
    """Return a record and a row with the same file name, whatever their ids; None if there is none."""
    matches = _rows_by_name(store, records, range(len(records)))
    for i, candidates in matches.items():
        return records[i], candidates[0][0]
    return None


def is_same_name(record: ImageRecord, name: str) -> bool:
    """Return whether the base names of a record and a file agree; a record may have no extension, or only an id."""
    base, other = _base_name(record.file_name), _base_name(name)
    return base == other or base == without_suffix(other) or record.file_name == str(record.image_id)


def _has_ids_from_names(store: FeatureStore) -> bool:
    return len(store) > 0 and int(store.image_id[0]) == id_from_name(store.file_name[0])


def _rows_by_name(
    store: FeatureStore, records: Sequence[ImageRecord], positions: Sequence[int]
) -> dict[int, list[tuple[int, str]]]:
    """Return position of a record -> (row, name) of the images with its name. Memory grows with `positions` only."""
    by_base_name: dict[str, list[int]] = defaultdict(list)
    for i in positions:
        by_base_name[without_suffix(_base_name(records[i].file_name))].append(i)
    matches: dict[int, list[tuple[int, str]]] = defaultdict(list)
    if by_base_name:
        for row, name in _names(store):
            for i in by_base_name.get(without_suffix(_base_name(name)), ()):
                if _is_same_file(name, records[i].file_name):
                    matches[i].append((row, name))
    return matches


def _names(store: FeatureStore) -> Iterator[tuple[int, str]]:
    for start in range(0, len(store), NAMES_PER_READ):
        yield from enumerate(store.file_name[start : start + NAMES_PER_READ], start)


def _base_name(name: str) -> str:
    return name.rpartition("/")[2]


def _is_same_file(name: str, other: str) -> bool:
    """Return whether one path ends with the other; `other` may have no extension."""
    if other == without_suffix(other):
        name = without_suffix(name)
    return name == other or name.endswith(f"/{other}") or other.endswith(f"/{name}")
