"""The plan: every image has one row, for good; what does not agree with the plan on disk is refused."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.errors import MismatchError, StoreError
from gridcap.extract.manifest import Image, ImageList
from gridcap.extract.plan import Plan, load_or_create_plan, read_plan

PROVENANCE: dict[str, Any] = {
    "encoder": "inception_v3",
    "layer": "Mixed_7c",
    "weights": {"name": "w.pth", "sha256": "a" * 64, "random": False},
    "preprocessing": {"decoder": "pillow", "resize_mode": "stretch", "side": 299},
    "grid_shape": [8, 8, 2048],
    "dtype": "float16",
    "precision": "float32",
    "versions": {"torch": "2.6.0"},
}


def listed(count: int, first: int = 0) -> list[Image]:
    return [(i * 7, f"folder/café {i}.jpg") for i in range(first, first + count)]


def make(
    split: str,
    images: list[Image],
    shard_size: int,
    batch_size: int,
    provenance: dict[str, Any],
    folder: Path | None = None,
) -> Plan:
    return Plan(split, shard_size, batch_size, provenance, (ImageList.make(images, shard_size, folder),))


def plan(count: int = 10, shard_size: int = 4, batch_size: int = 2, folder: Path | None = None, **change: Any) -> Plan:
    return make("train", listed(count), shard_size, batch_size, copy.deepcopy(PROVENANCE) | change, folder)


def settle(folder: Path, images: list[Image], append: bool = False, **change: Any) -> Plan:
    """As a run does: the list is written only where there is no plan yet."""
    fresh = None if (folder / "plan.json").exists() else folder
    wanted = make("train", images, 4, 2, copy.deepcopy(PROVENANCE) | change, fresh)
    return load_or_create_plan(wanted, images, folder, append=append)


def finish(made: Plan, folder: Path) -> None:
    """As if all shards had been made."""
    for shard in range(made.shards):
        (folder / made.shard_name(shard)).touch()


def all_images(made: Plan, folder: Path) -> list[Image]:
    return list(itertools.chain.from_iterable(made.images_of(shard, folder) for shard in range(made.shards)))


@pytest.mark.parametrize(
    ("images", "shard_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 1, [1]), (5, 1, [1, 1, 1, 1, 1]), (4, 1024, [4])],
)
def test_shards_divide_the_rows_with_only_the_last_one_short(images: int, shard_size: int, sizes: list[int]) -> None:
    made = plan(images, shard_size)
    assert made.shards == len(sizes)
    assert [len(made.rows_of(s)) for s in range(made.shards)] == sizes
    assert [row for s in range(made.shards) for row in made.rows_of(s)] == list(range(images))


def test_no_folder_gets_more_than_a_thousand_shards() -> None:
    made = plan(12_345, 1)
    names = [made.shard_name(s) for s in range(made.shards)]
    assert len(set(names)) == 12_345
    assert names[:2] == ["00000.h5", "00001.h5"]
    assert (names[999], names[1000], names[12_344]) == ("00999.h5", "001/01000.h5", "012/12344.h5")


def test_shards_there_are_found_in_every_folder_and_nothing_else_is(tmp_path: Path) -> None:
    made = plan(2500, 1)
    for name in ("00000.h5", "00999.h5", "001/01000.h5", "002/02499.h5", "002/02500.h5", ".00001.h5.tmp", "x.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert made.existing_shards(tmp_path) == [0, 999, 1000, 2499]
    assert made.existing_shards(tmp_path / "nothing") == []


def test_a_plan_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    made = plan(folder=tmp_path)
    (tmp_path / "plan.json").write_text(made.to_json(), encoding="utf-8")
    back = read_plan(tmp_path)
    assert back == made
    assert back.digest() == made.digest()
    assert back.to_json() == made.to_json()
    assert all_images(back, tmp_path) == listed(10)


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    turned = dict(reversed(PROVENANCE.items()))
    assert make("train", listed(10), 4, 2, turned).digest() == plan().digest()


def test_the_digest_changes_with_anything_in_the_plan() -> None:
    made = plan()
    others = [
        plan(11),
        plan(shard_size=5),
        plan(batch_size=3),
        plan(dtype="float32"),
        make("val", listed(10), 4, 2, PROVENANCE),
        make("train", listed(10)[::-1], 4, 2, PROVENANCE),
        make("train", [(i + 1, name) for i, name in listed(10)], 4, 2, PROVENANCE),
    ]
    assert len({made.digest(), *(other.digest() for other in others)}) == len(others) + 1


# ---------------------------------------------------------------------------------------------- on disk already


def test_the_first_plan_is_written_and_the_same_plan_agrees_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    first = settle(folder, listed(10))
    assert first == plan()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert settle(folder, listed(10)) == first
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(before) == [first.lists[0].file, "plan.json"]


def test_of_two_workers_that_start_at_once_the_second_compares_with_the_first(tmp_path: Path) -> None:
    """Both saw no plan, and both have written their lists: the plan of the first must not be overwritten."""
    one, two = plan(10, folder=tmp_path), plan(12, folder=tmp_path)
    same = plan(10, folder=tmp_path)
    assert load_or_create_plan(one, listed(10), tmp_path) == one
    assert load_or_create_plan(same, listed(10), tmp_path) == one
    with pytest.raises(MismatchError, match="2 new"):
        load_or_create_plan(two, listed(12), tmp_path)
    assert read_plan(tmp_path) == one


def test_a_store_once_begun_keeps_its_shard_size_and_batch_size(tmp_path: Path) -> None:
    load_or_create_plan(plan(shard_size=4, batch_size=2, folder=tmp_path), listed(10), tmp_path)
    kept = load_or_create_plan(plan(shard_size=5, batch_size=3), listed(10), tmp_path)
    assert (kept.shard_size, kept.batch_size) == (4, 2)
    assert kept == plan(shard_size=4, batch_size=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encoder": "resnet50"}, ["encoder", "inception_v3", "resnet50"]),
        ({"layer": "Mixed_7b"}, ["layer", "Mixed_7b"]),
        ({"weights": {"name": "v.pth", "sha256": "b" * 64, "random": False}}, ["weights", "w.pth", "v.pth"]),
        ({"weights": {"name": "w.pth", "sha256": "b" * 64, "random": False}}, ["weights", "aaaa", "bbbb"]),
        (
            {"preprocessing": {"decoder": "pillow", "resize_mode": "crop", "side": 299}},
            ["resize_mode", "crop", "stretch"],
        ),
        ({"grid_shape": [7, 7, 2048]}, ["grid_shape"]),
        ({"dtype": "float32"}, ["dtype", "float16", "float32"]),
        ({"precision": "bfloat16"}, ["precision", "float32", "bfloat16"]),
        ({"compile": True}, ["compile"]),
        ({"views": ["original", "hflip"]}, ["views", "hflip"]),
    ],
)
def test_other_features_than_planned_are_refused_with_what_differs(
    tmp_path: Path, change: dict[str, Any], named: list[str]
) -> None:
    settle(tmp_path, listed(10))
    before = (tmp_path / "plan.json").read_bytes()
    for append in (False, True):
        with pytest.raises(MismatchError) as caught:
            settle(tmp_path, listed(10), append, **change)
        for text in (*named, str(tmp_path / "plan.json")):
            assert text in caught.value.message
    assert (tmp_path / "plan.json").read_bytes() == before


def test_a_complete_store_does_not_mind_another_precision(tmp_path: Path) -> None:
    settle(tmp_path, listed(10))
    wanted = plan(precision="bfloat16", compile=True)
    assert load_or_create_plan(wanted, listed(10), tmp_path, {"precision", "compile"}) == plan()


def test_the_same_weights_under_another_name_are_the_same_weights(tmp_path: Path) -> None:
    settle(tmp_path, listed(10))
    assert settle(tmp_path, listed(10), weights={**PROVENANCE["weights"], "name": "renamed.pth"}) == plan()


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (listed(12), "10 there, 12 here (2 new, 0 gone)"),
        (listed(7), "10 there, 7 here (0 new, 3 gone)"),
        (listed(10, first=1), "10 there, 10 here (1 new, 1 gone)"),
        (listed(10)[::-1], "another order"),
    ],
    ids=["more", "fewer", "others", "reversed"],
)
def test_another_list_of_images_is_refused_with_what_differs(tmp_path: Path, images: list[Image], named: str) -> None:
    settle(tmp_path, listed(10))
    with pytest.raises(MismatchError) as caught:
        settle(tmp_path, images)
    assert named in caught.value.message
    assert "--output" in caught.value.hint


def test_everything_that_differs_is_named_at_once(tmp_path: Path) -> None:
    settle(tmp_path, listed(10))
    with pytest.raises(MismatchError, match=r"encoder.*dtype.*images"):
        settle(tmp_path, listed(12), encoder="resnet50", dtype="float32")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "not json",
        plan().to_json()[:-20],
        '{"format": "gridcap-plan", "version": 2}',
        plan().to_json().replace('"shard_size": 4', '"shard_size": 5'),
        plan().to_json().replace('"shard_size": 4', '"shard_size": 0'),
    ],
)
def test_a_damaged_plan_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(StoreError, match="not a plan") as caught:
        settle(tmp_path, listed(10))
    assert str(tmp_path / "plan.json") in caught.value.message


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan().to_json().replace('"version": 2', '"version": 99'))
    with pytest.raises(StoreError, match="version"):
        read_plan(tmp_path)


def test_no_plan_means_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no plan"):
        read_plan(tmp_path)


# ----------------------------------------------------------------------------------------------------- --append


def test_appended_images_come_after_all_others_and_leave_them_where_they_are(tmp_path: Path) -> None:
    first = settle(tmp_path, listed(10))
    more = [*listed(3, first=20), *listed(10), *listed(3, first=30)]
    longer = settle(tmp_path, more, append=True)
    assert all_images(longer, tmp_path) == [*listed(10), *listed(3, first=20), *listed(3, first=30)]
    assert [len(longer.rows_of(s)) for s in range(longer.shards)] == [4, 4, 2, 4, 2]
    assert [row for s in range(longer.shards) for row in longer.rows_of(s)] == list(range(16))
    assert [longer.digest_of(s) for s in range(3)] == [first.digest()] * 3
    assert longer.digest_of(3) == longer.digest() != first.digest()
    assert read_plan(tmp_path) == longer


def test_the_same_list_agrees_with_a_store_it_was_appended_to(tmp_path: Path) -> None:
    settle(tmp_path, listed(10))
    more = [*listed(3, first=20), *listed(10)]
    longer = settle(tmp_path, more, append=True)
    assert settle(tmp_path, more, append=True) == longer
    assert settle(tmp_path, more) == longer
    with pytest.raises(MismatchError, match=r"13 there, 14 here \(1 new, 0 gone\)"):
        settle(tmp_path, [*more, (1, "new.jpg")])


def test_images_may_be_appended_by_a_list_of_just_these_and_more_than_once(tmp_path: Path) -> None:
    finish(settle(tmp_path, listed(10)), tmp_path)
    finish(settle(tmp_path, listed(2, first=10), append=True), tmp_path)
    last = settle(tmp_path, listed(5, first=11), append=True)
    assert all_images(last, tmp_path) == listed(16)
    assert [len(last.rows_of(s)) for s in range(last.shards)] == [4, 4, 2, 2, 4]


def test_an_appended_image_may_not_take_another_ones_id(tmp_path: Path) -> None:
    first = settle(tmp_path, listed(10))
    finish(first, tmp_path)
    with pytest.raises(MismatchError, match=r"image 7 is other\.jpg"):
        settle(tmp_path, [(7, "other.jpg")], append=True)
    assert read_plan(tmp_path) == first


def test_images_of_another_list_are_not_appended_to_a_store_that_is_not_finished(tmp_path: Path) -> None:
    """The images still to be made would be looked for where the new ones are, and be rejected."""
    first = settle(tmp_path, listed(10))
    with pytest.raises(MismatchError, match="3 shards are still to be made, and 10 of their images"):
        settle(tmp_path, listed(5, first=20), append=True)
    assert read_plan(tmp_path) == first
    assert settle(tmp_path, listed(12), append=True).images == 12, "a longer list has them all"


def test_a_plan_that_another_process_has_changed_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, listed(10))
    old = read_plan(tmp_path)
    longer = settle(tmp_path, listed(12), append=True)
    answers = [old, longer]
    monkeypatch.setattr("gridcap.extract.plan.read_plan", lambda _: answers.pop(0))
    with pytest.raises(MismatchError, match="another process"):
        settle(tmp_path, listed(14), append=True)
    monkeypatch.undo()
    assert read_plan(tmp_path) == longer


def test_what_would_be_appended_can_be_told_without_writing(tmp_path: Path) -> None:
    first = settle(tmp_path, listed(10))
    before = sorted(p.name for p in tmp_path.iterdir())
    wanted = make("train", listed(12), 4, 2, PROVENANCE)
    assert load_or_create_plan(wanted, listed(12), tmp_path, append=True, write=False).images == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert read_plan(tmp_path) == first
