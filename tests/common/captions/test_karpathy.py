"""Karpathy's split files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gridcap.common.captions.records import CaptionSet, ImageRecord, Problems
from gridcap.common.errors import AnnotationError

Entry = dict[str, Any]
Load = Callable[..., CaptionSet]


def karpathy_entry(number: int, split: str, *sentences: object, **more: object) -> Entry:
    texts = [{"raw": s, "tokens": []} if isinstance(s, str) else s for s in sentences]
    return {"cocoid": number, "filename": f"{number}.jpg", "split": split, "sentences": texts, **more}


PARTS = [
    karpathy_entry(1, "train", "one", "uno", filepath="train2014"),
    karpathy_entry(2, "restval", "two", filepath="val2014"),
    karpathy_entry(3, "val", "three", filepath="val2014"),
    karpathy_entry(4, "test", "four", filepath="val2014"),
    karpathy_entry(5, "train", "five"),
]


@pytest.mark.parametrize("prefix", ["", "karpathy-"])
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("train", {"train2014/1.jpg": ("one", "uno"), "val2014/2.jpg": ("two",), "5.jpg": ("five",)}),
        ("val", {"val2014/3.jpg": ("three",)}),
        ("test", {"val2014/4.jpg": ("four",)}),
    ],
)
def test_parts_are_selected_by_both_names_and_train_includes_restval(
    load_karpathy: Load, captions_by_name: Any, prefix: str, part: str, expected: dict[str, tuple[str, ...]]
) -> None:
    loaded = load_karpathy(prefix + part, *PARTS)
    assert captions_by_name(loaded) == expected
    assert loaded.problems == Problems()


def test_files_without_cocoid_use_imgid(load_karpathy: Load) -> None:
    """Flickr8k and Flickr30k in Karpathy's layout have no COCO ids."""
    entry = {"imgid": 7, "filename": "f.jpg", "split": "val", "sentences": [{"raw": "a dog"}]}
    assert load_karpathy("val", entry).records == [ImageRecord(7, "f.jpg", ("a dog",))]


def test_entries_whose_split_is_not_a_string_are_in_no_part(load_karpathy: Load) -> None:
    odd = [karpathy_entry(9, "train", "x") | {"split": split} for split in ({}, [], None, 1)]
    assert load_karpathy("train", *PARTS, *odd).records == load_karpathy("train", *PARTS).records


@pytest.mark.parametrize("part", ["restval", "karpathy-", "mine", ""])
def test_an_unknown_part_raises_an_error_that_names_the_known_ones(load_karpathy: Load, part: str) -> None:
    with pytest.raises(AnnotationError, match=r"dataset_coco\.json") as caught:
        load_karpathy(part, *PARTS)
    assert "karpathy-val" in caught.value.hint


@pytest.mark.parametrize(
    ("invalid", "kind"),
    [
        (karpathy_entry(9, "train") | {"sentences": None}, "without sentences"),
        ("no entry", "without sentences"),
        (karpathy_entry(9, "train", "x") | {"cocoid": None}, "without a 64-bit integer id"),
        (karpathy_entry(1, "train", "the id of another"), "duplicate image id"),
        (karpathy_entry(2**63, "train", "x"), "without a 64-bit integer id"),
    ],
)
def test_an_invalid_entry_is_counted_and_the_rest_is_kept(
    load_karpathy: Load, count_problems: Any, invalid: object, kind: str
) -> None:
    loaded = load_karpathy("train", *PARTS, invalid)
    assert count_problems(loaded, kind) == 1
    assert loaded.records == load_karpathy("train", *PARTS).records


@pytest.mark.parametrize("sentence", ["", "  ", {"tokens": ["x"]}, None])
def test_an_empty_sentence_is_counted_and_its_image_kept(
    load_karpathy: Load, count_problems: Any, captions_by_name: Any, sentence: object
) -> None:
    loaded = load_karpathy("val", karpathy_entry(1, "val", "good", sentence, "too"))
    assert count_problems(loaded, "empty caption") == 1
    assert captions_by_name(loaded) == {"1.jpg": ("good", "too")}


def test_an_invalid_first_entry_does_not_hide_the_layout(
    load_karpathy: Load, count_problems: Any, captions_by_name: Any
) -> None:
    loaded = load_karpathy("val", {k: v for k, v in PARTS[0].items() if k != "sentences"}, *PARTS)
    assert count_problems(loaded, "without sentences") == 1
    assert captions_by_name(loaded) == {"val2014/3.jpg": ("three",)}


@pytest.mark.parametrize("more", [{"filename": "../x.jpg"}, {"filepath": "/data"}, {"filepath": "../val2014"}])
def test_a_file_name_outside_the_image_folder_raises_an_error(load_karpathy: Load, more: Entry) -> None:
    with pytest.raises(AnnotationError, match="leaves the image folder"):
        load_karpathy("val", karpathy_entry(1, "val", "x") | more)
