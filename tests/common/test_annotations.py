"""Caption files of every kind, whole and broken: nothing bad in a file is silent."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcap.common.annotations import (
    AnnotationSet,
    FolderImages,
    ImageRecord,
    Problems,
    id_from_name,
    list_images,
    load_annotations,
    load_split,
    split_images,
)
from gridcap.common.config import SplitConfig
from gridcap.common.errors import AnnotationError

Entry = dict[str, Any]

IMAGES: list[Entry] = [
    {"id": 30, "file_name": "c.jpg"},
    {"id": 10, "file_name": "a.jpg"},
    {"id": 20, "file_name": "sub/b.jpg"},
]
CAPTIONS: list[Entry] = [
    {"id": 1, "image_id": 10, "caption": "a dog"},
    {"id": 2, "image_id": 30, "caption": "a cat"},
    {"id": 3, "image_id": 10, "caption": "the dog again"},
    {"id": 4, "image_id": 20, "caption": "a cow"},
]


@pytest.fixture
def load_coco(tmp_path: Path) -> Callable[..., AnnotationSet]:
    """load_coco(images, annotations) writes a COCO captions file and reads it."""

    def load(images: Sequence[object] = IMAGES, annotations: object = CAPTIONS) -> AnnotationSet:
        path = tmp_path / "captions.json"
        path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
        return load_annotations(path)

    return load


@pytest.fixture
def load_csv(tmp_path: Path) -> Callable[[str], AnnotationSet]:
    """load_csv(text) writes a CSV and reads it."""

    def load(text: str) -> AnnotationSet:
        path = tmp_path / "captions.csv"
        path.write_bytes(text.encode())
        return load_annotations(path)

    return load


def counted(loaded: AnnotationSet, kind: str) -> int:
    """How many problems of the kinds whose name holds `kind`; there must be no others."""
    assert all(kind in name for name in loaded.problems.counts), loaded.problems.counts
    return sum(loaded.problems.counts.values())


def captions_of(loaded: AnnotationSet) -> dict[str, tuple[str, ...]]:
    return {record.file_name: record.captions for record in loaded.records}


# ---------------------------------------------------------------------------------------------- COCO JSON


def test_coco_images_keep_the_order_of_the_file_and_their_captions_too(load_coco: Callable[..., AnnotationSet]) -> None:
    loaded = load_coco()
    assert loaded.records == [
        ImageRecord(30, "c.jpg", ("a cat",)),
        ImageRecord(10, "a.jpg", ("a dog", "the dog again")),
        ImageRecord(20, "sub/b.jpg", ("a cow",)),
    ]
    assert loaded.problems == Problems()


def test_reading_coco_prints_nothing(
    load_coco: Callable[..., AnnotationSet], capfd: pytest.CaptureFixture[str]
) -> None:
    load_coco()
    assert capfd.readouterr() == ("", "")


def test_white_space_in_a_caption_is_one_blank(load_coco: Callable[..., AnnotationSet]) -> None:
    loaded = load_coco(IMAGES[:1], [{"id": 1, "image_id": 30, "caption": "  a \n cat\t "}])
    assert loaded.records[0].captions == ("a cat",)


def test_an_image_without_captions_is_kept(load_coco: Callable[..., AnnotationSet]) -> None:
    assert captions_of(load_coco(IMAGES, [])) == {"c.jpg": (), "a.jpg": (), "sub/b.jpg": ()}


@pytest.mark.parametrize(
    ("extra_image", "extra_annotation", "kind"),
    [
        (None, {"id": 9, "image_id": 99, "caption": "of no image"}, "unknown image"),
        (None, {"id": 9, "caption": "of no image either"}, "unknown image"),
        (None, {"id": 9, "image_id": 10, "caption": ""}, "empty caption"),
        (None, {"id": 9, "image_id": 10, "caption": " \n"}, "empty caption"),
        (None, {"id": 9, "image_id": 10, "caption": 7}, "empty caption"),
        (None, {"id": 1, "image_id": 20, "caption": "an id twice"}, "duplicate annotation id"),
        (None, {"id": 9, "image_id": 10}, "without a caption"),
        (None, "no entry at all", "without a caption"),
        ({"id": 10, "file_name": "again.jpg"}, None, "duplicate image id"),
        ({"file_name": "x.jpg"}, None, "without a whole-number id"),
        ({"id": "10", "file_name": "x.jpg"}, None, "without a whole-number id"),
        ({"id": 1.5, "file_name": "x.jpg"}, None, "without a whole-number id"),
        ("x.jpg", None, "without a whole-number id"),
        ({"id": True, "file_name": "x.jpg"}, None, "without a whole-number id"),
        ({"id": 2**63, "file_name": "x.jpg"}, None, "without a whole-number id"),
    ],
)
def test_a_bad_coco_entry_is_counted_by_kind_and_the_rest_is_kept(
    load_coco: Callable[..., AnnotationSet], extra_image: object, extra_annotation: object, kind: str
) -> None:
    images = [*IMAGES, *([extra_image] if extra_image else [])]
    annotations = [*CAPTIONS, *([extra_annotation] if extra_annotation else [])]
    loaded = load_coco(images, annotations)
    assert counted(loaded, kind) == 1
    assert loaded.records == load_coco().records


def test_captions_without_ids_are_kept_or_counted(load_coco: Callable[..., AnnotationSet]) -> None:
    """Hand-made files often leave the annotation ids out."""
    loaded = load_coco(IMAGES, [{k: v for k, v in entry.items() if k != "id"} for entry in CAPTIONS])
    kept = sum(len(record.captions) for record in loaded.records)
    assert kept + sum(loaded.problems.counts.values()) == len(CAPTIONS)
    assert kept in (0, len(CAPTIONS))


@pytest.mark.parametrize(
    ("extra_image", "extra_annotation"),
    [
        (None, {"id": 9, "image_id": [10], "caption": "x"}),
        (None, {"id": [9], "image_id": 10, "caption": "x"}),
        ({"id": [10], "file_name": "x.jpg"}, None),
    ],
)
def test_an_id_that_is_no_number_is_counted(
    load_coco: Callable[..., AnnotationSet], extra_image: object, extra_annotation: object
) -> None:
    images = [*IMAGES, *([extra_image] if extra_image else [])]
    loaded = load_coco(images, [*CAPTIONS, *([extra_annotation] if extra_annotation else [])])
    assert sum(loaded.problems.counts.values()) == 1


def test_an_instances_file_is_refused_with_the_file_that_is_meant(load_coco: Callable[..., AnnotationSet]) -> None:
    boxes = [{"id": i, "image_id": 10, "category_id": 18, "bbox": [1, 2, 3, 4]} for i in range(3)]
    with pytest.raises(AnnotationError, match="no captions") as caught:
        load_coco(IMAGES, boxes)
    assert "captions_*.json" in caught.value.hint
    assert "instances_" in caught.value.hint


@pytest.mark.parametrize("name", ["../a.jpg", "sub/../../a.jpg", "/etc/passwd", "a\0.jpg"])
def test_a_file_name_that_leaves_the_image_folder_is_refused(
    load_coco: Callable[..., AnnotationSet], name: object
) -> None:
    with pytest.raises(AnnotationError, match=r"captions\.json.*file name"):
        load_coco([*IMAGES, {"id": 40, "file_name": name}], CAPTIONS)


@pytest.mark.parametrize("name", ["", 5, None])
def test_an_image_without_a_file_name_is_counted(load_coco: Callable[..., AnnotationSet], name: object) -> None:
    loaded = load_coco([*IMAGES, {"id": 40, "file_name": name}], CAPTIONS)
    assert counted(loaded, "without a file name") == 1
    assert 40 not in [record.image_id for record in loaded.records]


# ------------------------------------------------------------------------------------------ Karpathy's file


def karpathy_entry(number: int, split: str, *sentences: object, **more: object) -> Entry:
    texts = [{"raw": s, "tokens": []} if isinstance(s, str) else s for s in sentences]
    return {"cocoid": number, "filename": f"{number}.jpg", "split": split, "sentences": texts, **more}


@pytest.fixture
def load_karpathy(tmp_path: Path) -> Callable[..., AnnotationSet]:
    """load_karpathy(part, *entries) writes a dataset_coco.json and reads one part."""

    def load(part: str, *entries: object) -> AnnotationSet:
        path = tmp_path / "dataset_coco.json"
        path.write_text(json.dumps({"dataset": "coco", "images": entries}))
        return load_annotations(path, part)

    return load


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
def test_karpathy_parts_by_both_names_and_restval_belongs_to_train(
    load_karpathy: Callable[..., AnnotationSet], prefix: str, part: str, expected: dict[str, tuple[str, ...]]
) -> None:
    loaded = load_karpathy(prefix + part, *PARTS)
    assert captions_of(loaded) == expected
    assert loaded.problems == Problems()


def test_karpathy_files_without_cocoid_use_imgid(load_karpathy: Callable[..., AnnotationSet]) -> None:
    """Flickr8k and Flickr30k in Karpathy's layout have no COCO ids."""
    entry = {"imgid": 7, "filename": "f.jpg", "split": "val", "sentences": [{"raw": "a dog"}]}
    assert load_karpathy("val", entry).records == [ImageRecord(7, "f.jpg", ("a dog",))]


def test_a_split_that_is_no_text_is_no_part_that_was_asked_for(load_karpathy: Callable[..., AnnotationSet]) -> None:
    odd = [karpathy_entry(9, "train", "x") | {"split": split} for split in ({}, [], None, 1)]
    assert load_karpathy("train", *PARTS, *odd).records == load_karpathy("train", *PARTS).records


def test_an_entry_too_deep_to_show_is_counted_all_the_same() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    problems = Problems()
    problems.add("image without sentences", deep)
    assert problems.lines() == ["1 x image without sentences (something that is too large to show)"]


@pytest.mark.parametrize("part", ["restval", "karpathy-", "mine", ""])
def test_a_part_that_karpathy_does_not_have_is_refused_with_those_it_has(
    load_karpathy: Callable[..., AnnotationSet], part: str
) -> None:
    with pytest.raises(AnnotationError, match=r"dataset_coco\.json") as caught:
        load_karpathy(part, *PARTS)
    assert "karpathy-val" in caught.value.hint


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (karpathy_entry(9, "train") | {"sentences": None}, "without sentences"),
        ("no entry", "without sentences"),
        (karpathy_entry(9, "train", "x") | {"cocoid": None}, "without a whole-number id"),
        (karpathy_entry(1, "train", "the id of another"), "duplicate image id"),
        (karpathy_entry(2**63, "train", "x"), "without a whole-number id"),
    ],
)
def test_a_bad_karpathy_entry_is_counted_and_the_rest_is_kept(
    load_karpathy: Callable[..., AnnotationSet], bad: object, kind: str
) -> None:
    loaded = load_karpathy("train", *PARTS, bad)
    assert counted(loaded, kind) == 1
    assert loaded.records == load_karpathy("train", *PARTS).records


@pytest.mark.parametrize("sentence", ["", "  ", {"tokens": ["x"]}, None])
def test_an_empty_karpathy_sentence_is_counted_and_its_image_kept(
    load_karpathy: Callable[..., AnnotationSet], sentence: object
) -> None:
    loaded = load_karpathy("val", karpathy_entry(1, "val", "good", sentence, "too"))
    assert counted(loaded, "empty caption") == 1
    assert captions_of(loaded) == {"1.jpg": ("good", "too")}


def test_a_bad_first_entry_does_not_hide_karpathys_layout(load_karpathy: Callable[..., AnnotationSet]) -> None:
    loaded = load_karpathy("val", {k: v for k, v in PARTS[0].items() if k != "sentences"}, *PARTS)
    assert counted(loaded, "without sentences") == 1
    assert captions_of(loaded) == {"val2014/3.jpg": ("three",)}


@pytest.mark.parametrize("more", [{"filename": "../x.jpg"}, {"filepath": "/data"}, {"filepath": "../val2014"}])
def test_a_karpathy_file_name_that_leaves_the_image_folder_is_refused(
    load_karpathy: Callable[..., AnnotationSet], more: Entry
) -> None:
    with pytest.raises(AnnotationError, match="leaves the image folder"):
        load_karpathy("val", karpathy_entry(1, "val", "x") | more)


# ----------------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize("header", ["", "image,caption\n", "Image,Caption\n", "file_name,caption\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_csv_with_and_without_header_from_any_editor(
    load_csv: Callable[[str], AnnotationSet], header: str, mark: str, line_end: str
) -> None:
    text = mark + header + "b.jpg,a dog\na.jpg,a cat\n\nb.jpg,the dog again\n"
    loaded = load_csv(text.replace("\n", line_end))
    assert captions_of(loaded) == {"b.jpg": ("a dog", "the dog again"), "a.jpg": ("a cat",)}
    assert [record.file_name for record in loaded.records] == ["b.jpg", "a.jpg"]
    assert loaded.problems == Problems()


def test_the_captions_of_flickr8k_are_read_by_their_own_name(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\n1000268201_693b08cb0e.jpg,A child in a pink dress .\n")
    assert captions_of(load_annotations(path)) == {"1000268201_693b08cb0e.jpg": ("A child in a pink dress .",)}


def test_commas_and_quotes_in_a_quoted_caption_are_kept(load_csv: Callable[[str], AnnotationSet]) -> None:
    loaded = load_csv('a.jpg,"a man, a ""big"" dog, and a cat"\n')
    assert loaded.records[0].captions == ('a man, a "big" dog, and a cat',)


def test_commas_in_a_caption_without_quotes_are_kept(load_csv: Callable[[str], AnnotationSet]) -> None:
    assert load_csv("a.jpg,a man,a dog,and a cat\n").records[0].captions == ("a man,a dog,and a cat",)


def test_the_blank_after_a_comma_without_quotes_is_kept(load_csv: Callable[[str], AnnotationSet]) -> None:
    assert load_csv("a.jpg, a man, a dog\n").records[0].captions == ("a man, a dog",)


def test_a_quote_that_is_never_closed_does_not_swallow_other_images(load_csv: Callable[[str], AnnotationSet]) -> None:
    try:
        loaded = load_csv('a.jpg,"a dog\nb.jpg,a cat\nc.jpg,a cow\n')
    except AnnotationError:
        return
    assert {"b.jpg", "c.jpg"} <= set(captions_of(loaded)) or loaded.problems.counts


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg,", "a.jpg,  ", 'a.jpg,""'])
def test_a_csv_line_without_a_caption_is_counted_and_its_image_kept(
    load_csv: Callable[[str], AnnotationSet], line: str
) -> None:
    loaded = load_csv(f"b.jpg,a dog\n{line}\n")
    assert counted(loaded, "empty caption") == 1
    assert captions_of(loaded) == {"b.jpg": ("a dog",), "a.jpg": ()}


def test_a_csv_line_that_names_no_image_is_counted(load_csv: Callable[[str], AnnotationSet]) -> None:
    loaded = load_csv("b.jpg,a dog\nnotes,read me\n17,a.jpg,a cat\n")
    assert counted(loaded, "no image file") == 2
    assert captions_of(loaded) == {"b.jpg": ("a dog",)}


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg"])
def test_a_csv_file_name_that_leaves_the_image_folder_is_refused(
    load_csv: Callable[[str], AnnotationSet], name: str
) -> None:
    with pytest.raises(AnnotationError, match="leaves the image folder"):
        load_csv(f"b.jpg,a dog\n{name},a cat\n")


def test_a_field_too_long_for_csv_costs_its_own_line(load_csv: Callable[[str], AnnotationSet]) -> None:
    loaded = load_csv("a.jpg,a dog\nb.jpg," + "x" * 200_000 + "\nc.jpg,a cow\n")
    assert counted(loaded, "no CSV") == 1
    assert captions_of(loaded) == {"a.jpg": ("a dog",), "c.jpg": ("a cow",)}


def test_a_quoted_word_in_a_caption_is_no_error(load_csv: Callable[[str], AnnotationSet]) -> None:
    loaded = load_csv('a.jpg,"Stop" sign on a wall\nb.jpg,a cat\n')
    assert captions_of(loaded) == {"a.jpg": ("Stop sign on a wall",), "b.jpg": ("a cat",)}


def test_the_id_of_an_image_without_one_depends_on_its_name_alone(load_csv: Callable[[str], AnnotationSet]) -> None:
    """So a photo has the same id in any subset of the file, and in a folder listing."""
    whole = {r.file_name: r.image_id for r in load_csv("a.jpg,x\nb.jpg,y\nsub/a.jpg,z\n").records}
    part = {r.file_name: r.image_id for r in load_csv("b.jpg,another caption\n").records}
    assert len(set(whole.values())) == 3
    assert part == {"b.jpg": whole["b.jpg"]}
    assert id_from_name("b.jpg") == whole["b.jpg"]
    assert all(0 <= i < 2**63 for i in whole.values())  # an int64 holds it


# ------------------------------------------------------------------------------------------------- a folder


def test_a_folder_gives_its_images_sorted_and_without_captions(tmp_path: Path) -> None:
    for name in ("z.jpg", "a.PNG", "sub/deep/m.webp", "notes.txt", "noimage"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    loaded = list_images(tmp_path / "photos")
    assert [r.file_name for r in loaded.records] == ["a.PNG", "sub/deep/m.webp", "z.jpg"]
    assert all(r.captions == () and r.image_id == id_from_name(r.file_name) for r in loaded.records)


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_is_missing_or_empty_is_refused_with_its_name(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "photos").mkdir()
    with pytest.raises(AnnotationError, match="photos"):
        list_images(tmp_path / "photos")


def test_a_folder_that_is_named_like_an_image_is_none(tmp_path: Path) -> None:
    (tmp_path / "photos" / "album.jpg").mkdir(parents=True)
    (tmp_path / "photos" / "album.jpg" / "a.png").touch()
    assert [r.file_name for r in list_images(tmp_path / "photos").records] == ["album.jpg/a.png"]


def test_a_file_name_that_is_not_utf8_is_refused_or_counted(tmp_path: Path) -> None:
    """Old archives unpack with Latin-1 names; HDF5 and JSON hold UTF-8."""
    (tmp_path / "a.jpg").touch()
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    try:
        loaded = list_images(tmp_path)
    except AnnotationError:
        return
    assert [r.file_name for r in loaded.records] == ["a.jpg"]
    assert sum(loaded.problems.counts.values()) == 1


# ------------------------------------------------------------------------------------------ unreadable files


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"images": [', "not valid JSON: line 1"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"images": [' + b"1" * 5000 + b"]}", "not valid JSON"),
        (b'{"images": "caf\xe9"}', "not UTF-8"),
        (b"\xff\xd8\xff\xe0 a JPEG", "not UTF-8"),
        (b"[1, 2]", "no list of images"),
        (b'{"annotations": []}', "no list of images"),
        (b'{"images": {}}', "no list of images"),
        (b'{"images": [], "annotations": {}}', "annotations is not a list"),
    ],
)
def test_what_is_no_captions_file_is_refused_with_its_name(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=why) as caught:
        load_annotations(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_missing_captions_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"nowhere\.json: No such file"):
        load_annotations(tmp_path / "nowhere.json")


# ------------------------------------------------------------------------------------- splits and their subsets


def write_coco(path: Path, images: int, captions: Sequence[int] = (), empty: int = 0) -> SplitConfig:
    """A file of so many images, the i-th with captions[i] captions, and some empty captions on the first."""
    entries = [{"id": i, "file_name": f"{i}.jpg"} for i in range(images)]
    of = [i for i, count in enumerate(captions) for _ in range(count)]
    texts: list[Entry] = [{"id": n, "image_id": i, "caption": f"caption {n}"} for n, i in enumerate(of)]
    texts += [{"id": len(of) + n, "image_id": 0, "caption": ""} for n in range(empty)]
    path.write_text(json.dumps({"images": entries, "annotations": texts}))
    return SplitConfig(images=path.parent, annotations=path)


def subset(split: SplitConfig, skip: int, limit: int | None, seed: int = 0) -> list[ImageRecord]:
    return load_split(split.model_copy(update={"skip": skip, "limit": limit}), "train", seed).records


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_cuts_of_one_order_are_disjoint_and_stable_and_together_the_whole(data: st.DataObject) -> None:
    images = data.draw(st.integers(1, 25))
    captions = data.draw(st.lists(st.integers(0, 4), min_size=images, max_size=images))
    cuts = sorted({0, *data.draw(st.sets(st.integers(0, images - 1), max_size=3))})
    seed = data.draw(st.integers(0, 5))
    with tempfile.TemporaryDirectory() as folder:
        split = write_coco(Path(folder) / "captions.json", images, captions)
        whole = load_split(split, "train", seed).records
        parts = [
            subset(split, start, None if end is None else end - start, seed)
            for start, end in zip(cuts, [*cuts[1:], None], strict=True)
        ]
        again = subset(split, cuts[-1], None, seed)
        plain = write_coco(Path(folder) / "other.json", images)
        without_captions = subset(plain, cuts[-1], None, seed)
    ids = [[record.image_id for record in part] for part in parts]
    assert sorted(i for part in ids for i in part) == [record.image_id for record in whole]
    assert all(part == sorted(part) for part in ids)  # in the order of the file
    assert again == parts[-1]
    assert [record.image_id for record in without_captions] == ids[-1]  # cut by images, never by captions
    by_id = {record.image_id: record for record in whole}
    assert all(record == by_id[record.image_id] for part in parts for record in part)


def test_the_subset_is_of_the_seed_and_random(tmp_path: Path) -> None:
    split = write_coco(tmp_path / "captions.json", 200)
    first = [r.image_id for r in subset(split, 0, 20, seed=0)]
    assert len(first) == 20
    assert first != list(range(20))
    assert first != [r.image_id for r in subset(split, 0, 20, seed=1)]


def test_a_smaller_subset_is_part_of_the_larger(tmp_path: Path) -> None:
    """So that an experiment on 20 images goes on with 50 that contain them."""
    split = write_coco(tmp_path / "captions.json", 100)
    assert {r.image_id for r in subset(split, 0, 20)} < {r.image_id for r in subset(split, 0, 50)}


def test_a_limit_beyond_the_end_takes_what_there_is(tmp_path: Path) -> None:
    split = write_coco(tmp_path / "captions.json", 5)
    assert len(subset(split, 0, 100)) == 5
    assert len(subset(split, 3, 100)) == 2


def test_a_subset_with_no_images_left_is_refused_with_the_split_name(tmp_path: Path) -> None:
    split = write_coco(tmp_path / "captions.json", 5)
    with pytest.raises(AnnotationError, match="'train'") as caught:
        subset(split, 5, 1)
    assert "skip" in caught.value.hint


def test_a_split_without_captions_lists_its_folder(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / name).touch()
    loaded = load_split(SplitConfig(images=tmp_path), "photos")
    assert [r.file_name for r in loaded.records] == ["a.jpg", "b.jpg"]


def test_the_name_of_a_split_picks_the_karpathy_part(tmp_path: Path) -> None:
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": PARTS}))
    loaded = load_split(SplitConfig(images=tmp_path, annotations=path), "karpathy-test")
    assert [r.image_id for r in loaded.records] == [4]


# 10 images with a caption each and 2 empty captions: 2 of 12 items are bad, 16.7 %.
@pytest.mark.parametrize("max_invalid", ["2", "17%", "16.7%", "100%"])
def test_fewer_problems_than_max_invalid_are_kept_and_counted(tmp_path: Path, max_invalid: str) -> None:
    split = write_coco(tmp_path / "captions.json", 10, [1] * 10, empty=2)
    loaded = load_split(split, "train", max_invalid=max_invalid)
    assert len(loaded.records) == 10
    assert loaded.problems.counts == {"empty caption": 2}


@pytest.mark.parametrize("max_invalid", ["0", "1", "0%", "16.6%"])
def test_more_problems_than_max_invalid_are_refused_with_their_counts(tmp_path: Path, max_invalid: str) -> None:
    split = write_coco(tmp_path / "captions.json", 10, [1] * 10, empty=2)
    with pytest.raises(AnnotationError) as caught:
        load_split(split, "train", max_invalid=max_invalid)
    message = caught.value.message
    assert "captions.json" in message
    assert "2 of 12" in message
    assert max_invalid in message
    assert "2 x empty caption (annotation 10, annotation 11)" in message
    assert "max_invalid" in caught.value.hint


def test_what_is_bad_is_judged_over_the_file_not_over_the_subset(tmp_path: Path) -> None:
    split = write_coco(tmp_path / "captions.json", 10, [1] * 10, empty=2)
    with pytest.raises(AnnotationError):
        load_split(split.model_copy(update={"limit": 1}), "train", max_invalid="1")


def test_problems_show_their_first_three_examples() -> None:
    problems = Problems()
    for number in range(5):
        problems.add("empty caption", f"annotation {number}")
    problems.add("duplicate image id", "x" * 500)
    many, one = problems.lines()
    assert many == "5 x empty caption (annotation 0, annotation 1, annotation 2, ...)"
    assert one.startswith("1 x duplicate image id (xxx")
    assert len(one) < 200


# ------------------------------------------------------------------------------------------------ folders, streamed


def test_a_folder_is_gone_through_in_the_order_of_whole_paths(tmp_path: Path) -> None:
    names = ["a/x.jpg", "a-b/x.jpg", "a.jpg", "b.PNG", "a/y/z.gif", "é.webp", "A.bmp"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for other in ("notes.txt", ".jpg", "a/nothing"):
        (tmp_path / other).touch()
    images = FolderImages(tmp_path)
    assert [image.file_name for image in images] == sorted(names)
    assert list(images) == list(images), "it can be gone through again"


def test_only_a_whole_folder_is_streamed(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").touch()
    whole, _ = split_images(SplitConfig(images=tmp_path), "s")
    assert not isinstance(whole, list)
    assert len(list(whole)) == 5
    some, _ = split_images(SplitConfig(images=tmp_path, limit=2), "s")
    assert isinstance(some, list)
    assert len(some) == 2


def test_bad_names_in_a_folder_are_counted_once_and_limited(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").touch()
    (tmp_path / os.fsdecode(b"bad\xff.jpg")).touch()
    images, problems = split_images(SplitConfig(images=tmp_path), "s", max_invalid="1")
    for _ in range(2):
        assert [image.file_name for image in images] == ["good.jpg"]
        assert sum(problems.counts.values()) == 1
    strict, _ = split_images(SplitConfig(images=tmp_path), "s", max_invalid="0")
    with pytest.raises(AnnotationError, match="1 of 2"):
        list(strict)
