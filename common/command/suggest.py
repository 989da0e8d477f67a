"""Suggestions for misspelled and renamed flags."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Old flag -> new flag. Only for suggestions: old flags are not accepted.
RENAMED_FLAGS = {
    "--accumulate": "--grad-accum-steps",
    "--allow-bad": "--allow-invalid",
    "--allow-rejects": "--allow-invalid",
    "--consensus": "--mbr",
    "--max-bad": "--max-invalid",
    "--rejected": "--invalid",
    "--retry-bad": "--retry-invalid",
    "--retry-rejected": "--retry-invalid",
    "--search": "--decoding",
    "--worker": "--rank",
    "--workers": "--world-size",
}


def suggest_flags(name: str, known: Iterable[str]) -> list[str]:
    """Return the known flags that an unknown flag may refer to, the best first.

    In this order: the new name of a renamed flag, flags that start with the given text, flags whose initials are the
    given text (``--lr`` for ``--learning-rate``), flags that contain all of its words, and similar spellings.
    """
    flags = sorted(flag for flag in known if flag.startswith("--") and flag != "--help")
    text = name.lstrip("-")
    words = set(text.split("-"))
    matches = [flag for flag in flags if RENAMED_FLAGS.get(name) == flag]
    matches += [flag for flag in flags if flag.startswith(f"--{text}")]
    matches += [flag for flag in flags if "".join(word[0] for word in flag[2:].split("-")) == text]
    matches += [flag for flag in flags if words <= set(flag[2:].split("-"))]
    if not matches:
        matches = difflib.get_close_matches(name, flags, n=2, cutoff=0.65)
    return list(dict.fromkeys(matches))[:3]
