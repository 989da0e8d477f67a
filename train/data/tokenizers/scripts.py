"""Scripts: which captions are written without spaces between words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

# Python's \w does not include combining marks; a letter or digit keeps the marks that follow it.
MARKS = re.escape("".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M"))

_THAI, _KANA, _HAN = "\u0e00-\u0e7f", "\u3040-\u30ff", "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_OTHER = "\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff"  # Lao, Burmese, Khmer
UNSPACED = re.compile(f"[{_THAI}{_KANA}{_HAN}{_OTHER}]")

_SHORT_WORDS = re.compile(f"[{_KANA}{_HAN}]")

# Characters per run without spaces: the mean is far above in unsegmented captions, and far below in segmented ones.
_MAX_LENGTH, _MAX_LENGTH_OF_SHORT_WORDS = 8, 3


def is_unsegmented(captions: Iterable[str]) -> bool:
    """Return whether most runs without spaces are long and in a script such as Chinese, Japanese, or Thai."""
    runs = Counter(run for caption in captions for run in re.findall(rf"[\w{MARKS}]+", caption))
    unspaced = {run: n for run, n in runs.items() if UNSPACED.search(run)}
    total = sum(unspaced.values())
    if 2 * total <= runs.total():
        return False
    limits = {run: _MAX_LENGTH_OF_SHORT_WORDS if _SHORT_WORDS.search(run) else _MAX_LENGTH for run in unspaced}
    return sum(len(run) / limits[run] * n for run, n in unspaced.items()) > total


def guess_language(captions: Sequence[str]) -> str | None:
    """Return the language of unsegmented captions: "ja", "th", "zh", or None for others."""
    text = "".join(captions)
    counts = {
        language: len(re.findall(f"[{script}]", text))
        for language, script in (("ja", _KANA), ("th", _THAI), ("zh", _HAN))
    }
    if 10 * counts["ja"] > counts["zh"] > 0:  # Japanese mixes kana with Chinese characters
        return "ja"
    language = max(counts, key=lambda name: counts[name])
    return language if counts[language] else None
