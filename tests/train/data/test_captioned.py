"""Item 24: captions match the images of a store by id, or by file name if one side has no ids of its own."""

from pathlib import Path

import numpy as np
import pytest

from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.errors import MismatchError
from gridcap.train.data.captioned import CaptionedImages

CAPTIONS = Path("captions.json")


@pytest.fixture
def store_of(tmp_path, new_store):
    """store_of(names, ids) writes a store; ids are derived from the names by default."""

    def make(names, ids=None):
        ids = [id_from_name(name) for name in names] if ids is None else ids
        return new_store(tmp_path / "s.h5", np.ones((len(names), 2, 2, 8), np.float16), ids, names)

    return make


def named(*names):
    """Records of a file without ids, such as CSV."""
    return [ImageRecord(id_from_name(name), name, (f"caption of {name}",)) for name in names]


def numbered(*names):
    """Records of a file with ids, such as COCO."""
    return [ImageRecord(i, name, (f"caption of {name}",)) for i, name in enumerate(names, 500)]


def test_item_24_a_store_without_captions_matches_coco_captions_by_name(store_of):
    data = CaptionedImages.join(store_of(["a.jpg", "b.jpg", "c.jpg"]), numbered("c.jpg", "x.jpg", "a.jpg"), CAPTIONS)
    assert data.rows.tolist() == [0, 2]
    assert data.captions == [("caption of a.jpg",), ("caption of c.jpg",)]
    assert data.left_out == {"not in the feature store": 1}


@pytest.mark.parametrize(
    ("stored", "given"), [("train/a.jpg", "a.jpg"), ("a.jpg", "train2014/a.jpg"), ("coco/train/a.jpg", "train/a.jpg")]
)
def test_item_24_names_match_if_one_path_ends_with_the_other(store_of, stored, given):
    data = CaptionedImages.join(store_of([stored, "other.jpg"]), numbered(given), CAPTIONS)
    assert data.rows.tolist() == [0]


def test_item_24_a_store_with_ids_matches_csv_captions_by_name(store_of):
    data = CaptionedImages.join(store_of(["a.jpg", "b.jpg"], [7, 8]), named("b.jpg"), CAPTIONS)
    assert data.rows.tolist() == [1]


def test_item_24_the_same_name_in_two_folders_is_not_confused(store_of):
    store = store_of(["cat/001.jpg", "dog/001.jpg"])
    data = CaptionedImages.join(store, numbered("dog/001.jpg", "cow/001.jpg"), CAPTIONS)
    assert data.rows.tolist() == [1]
    assert data.captions == [("caption of dog/001.jpg",)]
    assert data.left_out == {"not in the feature store": 1}


def test_item_24_an_ambiguous_name_is_an_error_that_names_both_candidates(store_of):
    store = store_of(["cat/001.jpg", "dog/001.jpg", "a.jpg"])
    with pytest.raises(MismatchError, match=r"1 ambiguous file name .*: 001\.jpg may be cat/001\.jpg or dog/001\.jpg"):
        CaptionedImages.join(store, numbered("001.jpg", "a.jpg"), CAPTIONS)


def test_item_24_two_records_cannot_share_a_row(store_of):
    store = store_of(["001.jpg", "a.jpg"])
    with pytest.raises(MismatchError, match=r"2 ambiguous .*: cat/001\.jpg and dog/001\.jpg both match 001\.jpg"):
        CaptionedImages.join(store, numbered("cat/001.jpg", "dog/001.jpg", "a.jpg"), CAPTIONS)


def test_item_24_two_sources_with_their_own_ids_do_not_match_by_name(store_of):
    """Files that number their images from 1 often share names, too."""
    with pytest.raises(MismatchError, match=r"image ids differ: a\.jpg is 7 in the store and 500") as caught:
        CaptionedImages.join(store_of(["a.jpg", "b.jpg"], [7, 8]), numbered("a.jpg", "b.jpg"), CAPTIONS)
    assert "--annotations captions.json" in caught.value.hint
