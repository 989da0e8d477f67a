"""The plan: every image has one row, for good; what does not agree with the plan on disk is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from common.annotations import ImageRecord
from common.errors import MismatchError, StoreError
from extract.plan import Plan, read_plan, settle_plan

PROVENANCE: dict[str, Any] = {
    "encoder": "inception_v3",
    "layer": "Mixed_7c",
    "weights": {"name": "w.pth", "sha256": "a" * 64, "random": False},
    "preprocessing": {"decoder": "pillow", "geometry": "stretch", "side": 299},
    "grid_shape": [8, 8, 2048],
    "dtype": "float16",
    "precision": "float32",
    "versions": {"torch": "2.6.0"},
}


def records(count: int, first: int = 0) -> list[ImageRecord]:
    return [ImageRecord(i * 7, f"folder/café {i}.jpg", ("a cat",)) for i in range(first, first + count)]


def plan(count: int = 10, shard_size: int = 4, batch_size: int = 2, **change: Any) -> Plan:
    return Plan.make("train", records(count), shard_size, batch_size, copy.deepcopy(PROVENANCE) | change)


@pytest.mark.parametrize(
    ("images", "shard_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 1, [1]), (5, 1, [1, 1, 1, 1, 1]), (4, 1024, [4])],
)
def test_shards_divide_the_rows_with_only_the_last_one_short(images: int, shard_size: int, sizes: list[int]) -> None:
    made = plan(images, shard_size)
    assert made.shards == len(sizes)
    assert [len(made.rows_of(s)) for s in range(made.shards)] == sizes
    assert [row for s in range(made.shards) for row in made.rows_of(s)] == list(range(images))


def test_shard_names_sort_in_the_order_of_their_rows() -> None:
    made = plan(12_000, 1)
    names = [made.shard_name(s) for s in range(made.shards)]
    assert names == sorted(set(names))


def test_a_plan_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    made = plan()
    (tmp_path / "plan.json").write_text(made.to_json(), encoding="utf-8")
    back = read_plan(tmp_path / "plan.json")
    assert back == made
    assert back.digest() == made.digest()
    assert back.to_json() == made.to_json()


def test_the_file_is_json_with_an_image_a_line() -> None:
    text = plan(10).to_json()
    assert json.loads(text)["images"][3] == [21, "folder/café 3.jpg"]
    assert sum("folder/café" in line for line in text.splitlines()) == 10


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    turned = dict(reversed(PROVENANCE.items()))
    assert Plan.make("train", records(10), 4, 2, turned).digest() == plan().digest()


def test_the_digest_changes_with_anything_in_the_plan() -> None:
    made = plan()
    others = [
        plan(11),
        plan(shard_size=5),
        plan(batch_size=3),
        plan(dtype="float32"),
        Plan.make("val", records(10), 4, 2, PROVENANCE),
        Plan.make("train", records(10)[::-1], 4, 2, PROVENANCE),
        Plan.make("train", [ImageRecord(r.image_id + 1, r.file_name) for r in records(10)], 4, 2, PROVENANCE),
    ]
    assert len({made.digest(), *(other.digest() for other in others)}) == len(others) + 1


def test_the_digest_does_not_depend_on_the_captions() -> None:
    bare = [ImageRecord(r.image_id, r.file_name) for r in records(10)]
    assert Plan.make("train", bare, 4, 2, PROVENANCE).digest() == plan().digest()


# ---------------------------------------------------------------------------------------------- on disk already


def test_the_first_plan_is_written_and_the_same_plan_agrees_with_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    assert settle_plan(plan(), path) == plan()
    written = path.read_bytes()
    assert settle_plan(plan(), path) == plan()
    assert path.read_bytes() == written
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_a_store_once_begun_keeps_its_shard_size_and_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    settle_plan(plan(shard_size=4, batch_size=2), path)
    kept = settle_plan(plan(shard_size=5, batch_size=3), path)
    assert (kept.shard_size, kept.batch_size) == (4, 2)
    assert kept == plan(shard_size=4, batch_size=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encoder": "resnet50"}, ["encoder", "inception_v3", "resnet50"]),
        ({"layer": "Mixed_7b"}, ["layer", "Mixed_7b"]),
        ({"weights": {"name": "v.pth", "sha256": "b" * 64, "random": False}}, ["weights", "w.pth", "v.pth"]),
        ({"weights": {"name": "w.pth", "sha256": "b" * 64, "random": False}}, ["weights", "aaaa", "bbbb"]),
        ({"preprocessing": {"decoder": "pillow", "geometry": "crop", "side": 299}}, ["geometry", "crop", "stretch"]),
        ({"grid_shape": [7, 7, 2048]}, ["grid_shape"]),
        ({"dtype": "float32"}, ["dtype", "float16", "float32"]),
        ({"precision": "bfloat16"}, ["precision", "float32", "bfloat16"]),
    ],
)
def test_other_features_than_planned_are_refused_with_what_differs(
    tmp_path: Path, change: dict[str, Any], named: list[str]
) -> None:
    path = tmp_path / "plan.json"
    settle_plan(plan(), path)
    before = path.read_bytes()
    with pytest.raises(MismatchError) as caught:
        settle_plan(plan(**change), path)
    for text in (*named, str(path)):
        assert text in caught.value.what
    assert path.read_bytes() == before


def test_the_same_weights_under_another_name_are_the_same_weights(tmp_path: Path) -> None:
    settle_plan(plan(), tmp_path / "plan.json")
    renamed = plan(weights={**PROVENANCE["weights"], "name": "renamed.pth"})
    assert settle_plan(renamed, tmp_path / "plan.json") == plan()


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (records(12), "10 there, 12 here (2 new, 0 gone)"),
        (records(7), "10 there, 7 here (0 new, 3 gone)"),
        (records(10, first=1), "10 there, 10 here (1 new, 1 gone)"),
        (records(10)[::-1], "another order"),
    ],
    ids=["more", "fewer", "others", "reversed"],
)
def test_another_list_of_images_is_refused_with_what_differs(
    tmp_path: Path, images: list[ImageRecord], named: str
) -> None:
    settle_plan(plan(), tmp_path / "plan.json")
    with pytest.raises(MismatchError) as caught:
        settle_plan(Plan.make("train", images, 4, 2, PROVENANCE), tmp_path / "plan.json")
    assert named in caught.value.what
    assert "--output" in caught.value.hint


def test_everything_that_differs_is_named_at_once(tmp_path: Path) -> None:
    settle_plan(plan(), tmp_path / "plan.json")
    with pytest.raises(MismatchError, match=r"encoder.*dtype.*images"):
        settle_plan(plan(12, encoder="resnet50", dtype="float32"), tmp_path / "plan.json")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "not json", plan().to_json()[:-20], '{"format": "gridcap-plan", "version": 1}']
)
def test_a_damaged_plan_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(StoreError, match="not a plan") as caught:
        settle_plan(plan(), path)
    assert str(path) in caught.value.what


def test_a_plan_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan().to_json().replace('"version": 1', '"version": 99'))
    with pytest.raises(StoreError) as caught:
        read_plan(path)
    assert "update" in caught.value.hint
