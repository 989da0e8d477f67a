"""Matching of features with images: exact names first, aliases only if unique."""

from __future__ import annotations

import numpy as np
import pytest

from gridcap.common.captions.records import ImageRecord
from gridcap.common.errors import UserError
from gridcap.extract.importers.matching import match_keys
from gridcap.extract.importers.source import Source, SourceError


def source(*keys: str) -> Source:
    return Source(list(keys), lambda key: np.zeros(1), "test", "")


def records(*names: str) -> list[ImageRecord]:
    """Return records with the ids 100, 101, ..."""
    return [ImageRecord(100 + i, name) for i, name in enumerate(names)]


def matches(keys: list[str], names: list[str]) -> dict[str, str]:
    return {record.file_name: key for record, key in match_keys(source(*keys), records(*names))}


@pytest.mark.parametrize("key", ["a/b.jpg", "b.jpg", "b", "a/b", "train/a/b.jpg", "b.png", "100", "000100"])
def test_an_image_matches_its_name_its_aliases_and_its_id(key: str) -> None:
    assert matches([key, "other.jpg"], ["a/b.jpg", "c.jpg"]) == {"a/b.jpg": key}


def test_item_02_a_key_in_another_folder_does_not_match() -> None:
    assert matches(["cat/001.jpg"], ["cat/001.jpg", "dog/001.jpg"]) == {"cat/001.jpg": "cat/001.jpg"}
    with pytest.raises(UserError, match=r"dog/001\.jpg, first feature: cat/001\.jpg"):
        matches(["cat/001.jpg"], ["dog/001.jpg"])


def test_item_02_exact_matches_take_precedence_over_aliases() -> None:
    keys = ["x/001.jpg", "001.jpg"]
    for names in (keys, keys[::-1]):
        assert matches(keys, names) == {name: name for name in names}
    assert matches(keys, ["x/001.jpg"]) == {"x/001.jpg": "x/001.jpg"}
    assert matches(keys, ["001.jpg"]) == {"001.jpg": "001.jpg"}


def test_item_02_an_alias_of_two_images_is_an_error_that_names_both() -> None:
    for key in ("001", "001.jpg"):
        with pytest.raises(SourceError, match=rf"{key}: matches both cat/001\.jpg .* and dog/001\.jpg"):
            matches([key], ["cat/001.jpg", "dog/001.jpg"])


def test_item_02_two_keys_of_one_image_are_an_error_that_names_both() -> None:
    with pytest.raises(SourceError, match=r"^001\.jpg: both x/001\.jpg and y/001\.jpg match"):
        matches(["x/001.jpg", "y/001.jpg"], ["001.jpg"])


def test_item_02_an_id_of_one_image_that_is_the_stem_of_another_is_an_error() -> None:
    with pytest.raises(SourceError, match=r"101: matches both 101\.jpg \(id 100\) and x\.jpg \(id 101\)"):
        matches(["101"], ["101.jpg", "x.jpg"])


def test_coco_names_match_with_leading_zeros() -> None:
    coco = [ImageRecord(9, "000000000009.jpg")]
    for key in ("9", "000000000009", "000000000009.jpg"):
        assert match_keys(source(key), coco) == [(coco[0], key)]


def test_images_without_features_are_left_out_and_order_is_kept() -> None:
    assert list(matches(["a.jpg", "c.jpg"], ["c.jpg", "b.jpg", "a.jpg"])) == ["c.jpg", "a.jpg"]


def test_features_of_other_images_are_a_usage_error() -> None:
    with pytest.raises(UserError, match=r"none of the 2 images.*b\.jpg, first feature: z\.jpg"):
        matches(["z.jpg"], ["b.jpg", "a.jpg"])


def test_item_20_keys_with_the_same_image_id_are_rejected() -> None:
    with pytest.raises(SourceError, match="7 and 007: both have the image id 7"):
        match_keys(source("7", "007"), None)
