"""Matching images with captions to the rows of a feature store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gridcap.common.captions.match import Matches, find_same_name, match_rows
from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.store.codecs import find_codec
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter

MakeStore = Callable[..., FeatureStore]


@pytest.fixture
def store_of(tmp_path: Path, provenance: dict[str, object]) -> MakeStore:
    """store_of(names, ids) writes a store of one shard; the ids are derived from the names by default."""

    def make(names: Sequence[str], ids: Sequence[int] | None = None) -> FeatureStore:
        images = list(zip(ids or [id_from_name(name) for name in names], names, strict=True))
        spec = ShardSpec(images, GridLayout((2, 3, 4), find_codec("float16")), provenance)
        with ShardWriter(tmp_path / "store.h5", spec) as writer:
            writer.write(0, np.zeros((len(names), 2, 3, 4), np.float16), {})
            writer.finish()
        return FeatureStore(tmp_path / "store.h5")

    return make


def numbered(*names: str) -> list[ImageRecord]:
    """Records of a file with ids, such as COCO."""
    return [ImageRecord(i, name) for i, name in enumerate(names, 500)]


def test_ids_take_precedence_over_names(store_of: MakeStore) -> None:
    store = store_of(["a.jpg", "b.jpg"], [7, 8])
    assert match_rows(store, [ImageRecord(8, "a.jpg")]) == Matches([1], {})


def test_item_02_an_equal_name_takes_precedence_over_an_alias_in_the_store(store_of: MakeStore) -> None:
    store = store_of(["train/a.jpg", "a.jpg"])
    assert match_rows(store, numbered("a.jpg")) == Matches([1], {})


def test_item_02_an_equal_name_takes_precedence_over_an_alias_in_the_records(store_of: MakeStore) -> None:
    store = store_of(["train/a.jpg", "b.jpg"])
    assert match_rows(store, numbered("a.jpg", "train/a.jpg")) == Matches(
        [None, 0], {0: "a.jpg and train/a.jpg both match train/a.jpg"}
    )


def test_item_02_an_alias_does_not_take_the_row_of_an_id(store_of: MakeStore) -> None:
    store = store_of(["a.jpg", "b.jpg"])
    records = [ImageRecord(id_from_name("a.jpg"), "a.jpg"), ImageRecord(500, "x/a.jpg")]
    assert match_rows(store, records) == Matches([0, None], {1: "x/a.jpg and a.jpg both match a.jpg"})


@pytest.mark.parametrize("names", [("a.jpg", "a.jpg"), ("x/a.jpg", "y/a.jpg")])
def test_two_records_that_match_a_row_equally_well_are_ambiguous(store_of: MakeStore, names: tuple[str, str]) -> None:
    matches = match_rows(store_of(["a.jpg"]), numbered(*names))
    assert matches.rows == [None, None]
    assert matches.ambiguous[0] == f"{names[0]} and {names[1]} both match a.jpg"
    assert set(matches.ambiguous) == {0, 1}


def test_a_name_without_extension_matches_unless_it_is_ambiguous(store_of: MakeStore) -> None:
    assert match_rows(store_of(["x/a.jpg", "b.jpg"]), numbered("a", "b")) == Matches([0, 1], {})


def test_a_name_without_extension_of_two_rows_is_ambiguous(store_of: MakeStore) -> None:
    assert match_rows(store_of(["a.jpg", "a.png"]), numbered("a")) == Matches([None], {0: "a may be a.jpg or a.png"})


def test_find_same_name_ignores_ids(store_of: MakeStore) -> None:
    store = store_of(["a.jpg", "b.jpg"], [7, 8])
    records = numbered("c.jpg", "b.jpg")
    assert find_same_name(store, records) == (records[1], 1)
    assert find_same_name(store, records[:1]) is None
