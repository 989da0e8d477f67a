"""COCO captions files, valid and invalid: every invalid entry is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gridcap.common.captions.records import CaptionSet, ImageRecord, Problems
from gridcap.common.errors import AnnotationError

Entry = dict[str, Any]
Load = Callable[..., CaptionSet]


def test_images_and_captions_keep_file_order(load_coco: Load) -> None:
    loaded = load_coco()
    assert loaded.records == [
        ImageRecord(30, "c.jpg", ("a cat",)),
        ImageRecord(10, "a.jpg", ("a dog", "the dog again")),
        ImageRecord(20, "sub/b.jpg", ("a cow",)),
    ]
    assert loaded.problems == Problems()


def test_pycocotools_output_is_suppressed(load_coco: Load, capfd: pytest.CaptureFixture[str]) -> None:
    load_coco()
    assert capfd.readouterr() == ("", "")


def test_white_space_in_captions_is_collapsed(load_coco: Load, images: list[Entry]) -> None:
    loaded = load_coco(images[:1], [{"id": 1, "image_id": 30, "caption": "  a \n cat\t "}])
    assert loaded.records[0].captions == ("a cat",)


def test_images_without_captions_are_kept(load_coco: Load, images: list[Entry], captions_by_name: Any) -> None:
    assert captions_by_name(load_coco(images, [])) == {"c.jpg": (), "a.jpg": (), "sub/b.jpg": ()}


@pytest.mark.parametrize(
    ("extra_image", "extra_annotation", "kind"),
    [
        (None, {"id": 9, "image_id": 99, "caption": "of an unknown image"}, "unknown image"),
        (None, {"id": 9, "caption": "without an image id"}, "unknown image"),
        (None, {"id": 9, "image_id": 10, "caption": ""}, "empty caption"),
        (None, {"id": 9, "image_id": 10, "caption": " \n"}, "empty caption"),
        (None, {"id": 9, "image_id": 10, "caption": 7}, "empty caption"),
        (None, {"id": 9, "image_id": 10, "caption": "half a surrogate pair: \ud83d"}, "not valid Unicode"),
        (None, {"id": 1, "image_id": 20, "caption": "an id twice"}, "duplicate annotation id"),
        (None, {"id": 9, "image_id": 10}, "without a caption"),
        (None, "not an entry", "without a caption"),
        ({"id": 10, "file_name": "again.jpg"}, None, "duplicate image id"),
        ({"file_name": "x.jpg"}, None, "without a 64-bit integer id"),
        ({"id": "10", "file_name": "x.jpg"}, None, "duplicate image id"),
        ({"id": 1.5, "file_name": "x.jpg"}, None, "without a 64-bit integer id"),
        ("x.jpg", None, "without a 64-bit integer id"),
        ({"id": True, "file_name": "x.jpg"}, None, "without a 64-bit integer id"),
        ({"id": 2**63, "file_name": "x.jpg"}, None, "without a 64-bit integer id"),
    ],
)
def test_an_invalid_entry_is_counted_by_kind_and_the_rest_is_kept(
    load_coco: Load,
    images: list[Entry],
    captions: list[Entry],
    count_problems: Any,
    extra_image: object,
    extra_annotation: object,
    kind: str,
) -> None:
    loaded = load_coco(
        [*images, *([extra_image] if extra_image else [])],
        [*captions, *([extra_annotation] if extra_annotation else [])],
    )
    assert count_problems(loaded, kind) == 1
    assert loaded.records == load_coco().records


def test_annotations_without_ids_are_read(load_coco: Load, images: list[Entry], captions: list[Entry]) -> None:
    """Hand-written files often omit the annotation ids."""
    loaded = load_coco(images, [{key: value for key, value in entry.items() if key != "id"} for entry in captions])
    assert loaded.records == load_coco().records
    assert loaded.problems == Problems()


@pytest.mark.parametrize(
    ("extra_image", "extra_annotation"),
    [
        (None, {"id": 9, "image_id": [10], "caption": "x"}),
        (None, {"id": [9], "image_id": 10, "caption": "x"}),
        ({"id": [10], "file_name": "x.jpg"}, None),
    ],
)
def test_an_id_that_is_not_a_number_is_counted(
    load_coco: Load, images: list[Entry], captions: list[Entry], extra_image: object, extra_annotation: object
) -> None:
    loaded = load_coco(
        [*images, *([extra_image] if extra_image else [])],
        [*captions, *([extra_annotation] if extra_annotation else [])],
    )
    assert loaded.problems.total == 1


def test_an_instances_file_raises_an_error_that_names_the_captions_file(load_coco: Load, images: list[Entry]) -> None:
    boxes = [{"id": i, "image_id": 10, "category_id": 18, "bbox": [1, 2, 3, 4]} for i in range(3)]
    with pytest.raises(AnnotationError, match="no captions") as caught:
        load_coco(images, boxes)
    assert "captions_*.json" in caught.value.hint
    assert "instances_" in caught.value.hint


@pytest.mark.parametrize("name", ["../a.jpg", "sub/../../a.jpg", "/etc/passwd", "a\0.jpg"])
def test_a_file_name_outside_the_image_folder_raises_an_error(
    load_coco: Load, images: list[Entry], captions: list[Entry], name: object
) -> None:
    with pytest.raises(AnnotationError, match=r"captions\.json.*file name"):
        load_coco([*images, {"id": 40, "file_name": name}], captions)


@pytest.mark.parametrize("name", ["", 5, None])
def test_an_image_without_a_file_name_is_counted(
    load_coco: Load, images: list[Entry], captions: list[Entry], count_problems: Any, name: object
) -> None:
    loaded = load_coco([*images, {"id": 40, "file_name": name}], captions)
    assert count_problems(loaded, "without a file name") == 1
    assert 40 not in [record.image_id for record in loaded.records]
