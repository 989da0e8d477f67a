"""A summary of a captions file: how it is interpreted, and what it contains."""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from gridcap.common.captions.read import read_captions
from gridcap.common.captions.records import CaptionSet
from gridcap.common.captions.source import Columns
from gridcap.common.text import escape_line, plural

MIN_COUNTS = (1, 2, 5, 10)
EXAMPLES = 5
SHOWN_CHARACTERS = 100
SCRIPTS = {  # word in the Unicode names of letters -> script; the first languages are the most common ones
    "LATIN": "Latin (English, Spanish, German, Vietnamese, ...)",
    "CYRILLIC": "Cyrillic (Russian, Ukrainian, ...)",
    "GREEK": "Greek",
    "ARABIC": "Arabic (Arabic, Persian, Urdu)",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari (Hindi, Marathi, Nepali)",
    "BENGALI": "Bengali",
    "TAMIL": "Tamil",
    "THAI": "Thai",
    "HANGUL": "Hangul (Korean)",
    "CJK": "Han (Chinese, Japanese)",
    "HIRAGANA": "Kana (Japanese)",
    "KATAKANA": "Kana (Japanese)",
}
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI")
WORDS = re.compile(r"[^\W_]+(?:'\w+)?")


def describe_captions(path: Path, part: str = "train", columns: Columns | None = None) -> list[str]:
    """Return the lines that describe a captions file: format, columns, counts, vocabulary, scripts, and examples.

    Args:
        path: the captions file.
        part: part of a file that contains several.
        columns: columns chosen by the user.

    Raises:
        AnnotationError: unreadable file or unsupported format.
    """
    loaded = read_captions(path, part, columns)
    captions = [caption for record in loaded.records for caption in record.captions]
    roles = ", ".join(f"{role} = {escape_line(names)}" for role, names in loaded.columns.items())
    lines = [f"{'format':<15}{loaded.format}"]
    lines += [f"{'columns':<15}{roles}"] if roles else []
    per_image = Counter(len(record.captions) for record in loaded.records)
    counts = ", ".join(f"{count}: {plural(per_image[count], 'image')}" for count in sorted(per_image)[:8])
    lines += [
        f"{'part':<15}{part}: {plural(len(loaded.records), 'image')}, {plural(len(captions), 'caption')}",
        f"{'per image':<15}{counts}{', ...' if len(per_image) > 8 else ''}",
    ]
    if captions:
        lines += [*_text_lines(captions), *_duplicate_lines(loaded)]
    lines += [f"{'note':<15}{line}" for line in loaded.problems.lines()]
    return lines + [f"{'example':<15}{line}" for line in _examples(loaded)]


def _text_lines(captions: Sequence[str]) -> list[str]:
    """Describe the scripts, the lengths, and the vocabulary of captions."""
    scripts = Counter(script for caption in captions if (script := script_of(caption)) is not None)
    total = max(1, scripts.total())
    names: Counter[str] = Counter()
    for script, count in scripts.items():
        names[SCRIPTS.get(script, script.capitalize())] += count
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in names.most_common(3)) or "none"
    by_character = sum(scripts[script] for script in WITHOUT_SPACES) > total / 2
    unit = "character" if by_character else "word"
    units = [units_of(caption, by_character) for caption in captions]
    lengths = sorted(map(len, units))
    median, longest = statistics.median(lengths), lengths[-1]
    lines = [
        f"{'script':<15}{shares}",
        f"{'lengths':<15}{lengths[0]} to {longest} {unit}s, median {median:g}, "
        f"95% have at most {lengths[int(0.95 * (len(lengths) - 1))]}",
    ]
    counts = Counter(unit for caption in units for unit in caption)
    for min_count in MIN_COUNTS:
        kept = [count for count in counts.values() if count >= min_count]
        coverage = sum(kept) / max(1, counts.total())
        size = plural(len(kept), f"distinct {unit}")
        lines.append(f"{'vocabulary':<15}min_count {min_count}: {size}, {coverage:.2%} of all {unit}s")
    return lines


def script_of(text: str) -> str | None:
    """Return the script of most letters of a text, as in their Unicode names; kana marks a text as Japanese."""
    scripts: Counter[str] = Counter(_script_of_letter(letter) for letter in text if letter.isalpha())
    for kana in ("HIRAGANA", "KATAKANA"):
        if scripts[kana]:
            return "HIRAGANA"
    return scripts.most_common(1)[0][0] if scripts else None


def _script_of_letter(letter: str) -> str:
    return unicodedata.name(letter, "OTHER").split(" ")[0].partition("-")[0]


def units_of(text: str, by_character: bool) -> list[str]:
    """Return the lower-case words of a text, or its characters if its language has no spaces."""
    return [character for character in text if character.isalnum()] if by_character else WORDS.findall(text.lower())


def _duplicate_lines(loaded: CaptionSet) -> list[str]:
    repeated = sum(len(record.captions) - len(set(record.captions)) for record in loaded.records)
    images = Counter(caption for record in loaded.records for caption in set(record.captions))
    shared = sum(count > 1 for count in images.values())
    common, count = images.most_common(1)[0]
    text = f"{plural(repeated, 'caption')} repeated for one image; {plural(shared, 'text')} used for several images"
    most = f" (most: {count} x {_short(common)})" if count > 1 else ""
    return [f"{'duplicates':<15}{text}{most}"]


def _examples(loaded: CaptionSet) -> Iterable[str]:
    for record in loaded.records[:EXAMPLES]:
        more = f" (and {len(record.captions) - 1} more)" if len(record.captions) > 1 else ""
        caption = _short(record.captions[0]) if record.captions else "(no captions)"
        yield f"{escape_line(record.file_name)} (id {record.image_id}): {caption}{more}"


def _short(text: str) -> str:
    return escape_line(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")
