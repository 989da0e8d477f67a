"""Planning: a request that does not match the plan on disk is an error; new images are appended."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.errors import MismatchError
from gridcap.extract.manifest import Image
from gridcap.extract.plan import Plan, read_plan
from gridcap.extract.planning import PlanRequest, load_or_create_plan, resolve_plan, save_plan
from tests.extract.planning_helpers import PROVENANCE, all_images, make_images, make_plan, plan


def load(folder: Path, images: list[Image], append: bool = False, **change: Any) -> Plan:
    """Load or create the plan of a store as a run does."""
    requested = make_plan("train", images, 4, 2, copy.deepcopy(PROVENANCE) | change)
    return load_or_create_plan(PlanRequest(requested, images, folder, append=append))


def create_shards(made: Plan, folder: Path) -> None:
    """Create all shards as empty files."""
    for shard in range(made.shards):
        (folder / made.shard_name(shard)).touch()


def test_the_first_plan_is_saved_and_an_identical_request_returns_it(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    first = load(folder, make_images(10))
    assert first == plan()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert load(folder, make_images(10)) == first
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(before) == [first.lists[0].file, "plan.json"]


def test_of_two_processes_that_start_at_once_the_second_compares_with_the_first(tmp_path: Path) -> None:
    """Both have found no plan: that of the first must not be overwritten."""
    one, two = plan(10, folder=tmp_path), plan(12, folder=tmp_path)
    same = plan(10, folder=tmp_path)
    assert load_or_create_plan(PlanRequest(one, make_images(10), tmp_path)) == one
    assert load_or_create_plan(PlanRequest(same, make_images(10), tmp_path)) == one
    with pytest.raises(MismatchError, match="2 new"):
        load_or_create_plan(PlanRequest(two, make_images(12), tmp_path))
    assert read_plan(tmp_path) == one


def test_a_started_store_keeps_its_shard_size_and_batch_size(tmp_path: Path) -> None:
    load_or_create_plan(PlanRequest(plan(shard_size=4, batch_size=2, folder=tmp_path), make_images(10), tmp_path))
    kept = load_or_create_plan(PlanRequest(plan(shard_size=5, batch_size=3), make_images(10), tmp_path))
    assert (kept.shard_size, kept.batch_size) == (4, 2)
    assert kept == plan(shard_size=4, batch_size=2)


@pytest.mark.parametrize(
    ("change", "expected"),
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
def test_a_request_for_different_features_is_an_error_that_lists_the_differences(
    tmp_path: Path, change: dict[str, Any], expected: list[str]
) -> None:
    load(tmp_path, make_images(10))
    before = (tmp_path / "plan.json").read_bytes()
    for append in (False, True):
        with pytest.raises(MismatchError) as caught:
            load(tmp_path, make_images(10), append, **change)
        for text in (*expected, str(tmp_path / "plan.json")):
            assert text in caught.value.message
    assert (tmp_path / "plan.json").read_bytes() == before


def test_arithmetic_left_at_auto_follows_the_plan_on_disk(tmp_path: Path) -> None:
    load(tmp_path, make_images(10))
    requested = plan(precision="bfloat16", compile=True)
    assert load_or_create_plan(PlanRequest(requested, make_images(10), tmp_path, {"precision", "compile"})) == plan()


def test_renamed_weights_are_the_same_weights(tmp_path: Path) -> None:
    load(tmp_path, make_images(10))
    assert load(tmp_path, make_images(10), weights={**PROVENANCE["weights"], "name": "renamed.pth"}) == plan()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (make_images(12), "expected 10, got 12 (2 new, 0 gone)"),
        (make_images(7), "expected 10, got 7 (0 new, 3 gone)"),
        (make_images(10, first=1), "expected 10, got 10 (1 new, 1 gone)"),
        (make_images(10)[::-1], "a different order"),
    ],
    ids=["more", "fewer", "others", "reversed"],
)
def test_a_different_image_list_is_an_error_that_counts_the_differences(
    tmp_path: Path, images: list[Image], expected: str
) -> None:
    load(tmp_path, make_images(10))
    with pytest.raises(MismatchError) as caught:
        load(tmp_path, images)
    assert expected in caught.value.message
    assert "--output" in caught.value.hint


def test_all_differences_are_reported_at_once(tmp_path: Path) -> None:
    load(tmp_path, make_images(10))
    with pytest.raises(MismatchError, match=r"encoder.*dtype.*images"):
        load(tmp_path, make_images(12), encoder="resnet50", dtype="float32")


# --append


def test_appended_images_follow_the_existing_rows(tmp_path: Path) -> None:
    first = load(tmp_path, make_images(10))
    more = [*make_images(3, first=20), *make_images(10), *make_images(3, first=30)]
    longer = load(tmp_path, more, append=True)
    assert all_images(longer, tmp_path) == [*make_images(10), *make_images(3, first=20), *make_images(3, first=30)]
    assert [len(longer.rows_of(s)) for s in range(longer.shards)] == [4, 4, 2, 4, 2]
    assert [row for s in range(longer.shards) for row in longer.rows_of(s)] == list(range(16))
    assert [longer.digest_of(s) for s in range(3)] == [first.digest()] * 3
    assert longer.digest_of(3) == longer.digest() != first.digest()
    assert read_plan(tmp_path) == longer


def test_a_list_matches_the_store_that_it_was_appended_to(tmp_path: Path) -> None:
    load(tmp_path, make_images(10))
    more = [*make_images(3, first=20), *make_images(10)]
    longer = load(tmp_path, more, append=True)
    assert load(tmp_path, more, append=True) == longer
    assert load(tmp_path, more) == longer
    with pytest.raises(MismatchError, match=r"expected 13, got 14 \(1 new, 0 gone\)"):
        load(tmp_path, [*more, (1, "new.jpg")])


def test_new_images_can_be_appended_alone_and_repeatedly(tmp_path: Path) -> None:
    create_shards(load(tmp_path, make_images(10)), tmp_path)
    create_shards(load(tmp_path, make_images(2, first=10), append=True), tmp_path)
    last = load(tmp_path, make_images(5, first=11), append=True)
    assert all_images(last, tmp_path) == make_images(16)
    assert [len(last.rows_of(s)) for s in range(last.shards)] == [4, 4, 2, 2, 4]


def test_an_appended_image_with_the_id_of_another_image_is_an_error(tmp_path: Path) -> None:
    first = load(tmp_path, make_images(10))
    create_shards(first, tmp_path)
    with pytest.raises(MismatchError, match=r"image id 7 is other\.jpg"):
        load(tmp_path, [(7, "other.jpg")], append=True)
    assert read_plan(tmp_path) == first


def test_a_list_without_the_images_of_unfinished_shards_is_not_appended(tmp_path: Path) -> None:
    """They would be read from the folder of the new images and become invalid."""
    first = load(tmp_path, make_images(10))
    with pytest.raises(MismatchError, match="3 shards unfinished, and 10 images of them"):
        load(tmp_path, make_images(5, first=20), append=True)
    assert read_plan(tmp_path) == first
    assert load(tmp_path, make_images(12), append=True).images == 12, "a longer list has them all"


def append_request(folder: Path, images: list[Image]) -> PlanRequest:
    return PlanRequest(make_plan("train", images, 4, 2, PROVENANCE), images, folder, append=True)


def test_item_13_two_processes_that_append_the_same_images_agree(tmp_path: Path) -> None:
    """Both resolve before either has saved."""
    load(tmp_path, make_images(10))
    request = append_request(tmp_path, make_images(12))
    one, two = resolve_plan(request), resolve_plan(request)
    assert save_plan(request, one).plan == save_plan(request, two).plan == read_plan(tmp_path)
    assert read_plan(tmp_path).images == 12


def test_item_13_two_processes_that_start_the_same_store_agree(tmp_path: Path) -> None:
    request = PlanRequest(plan(), make_images(10), tmp_path)
    one, two = resolve_plan(request), resolve_plan(request)
    assert save_plan(request, one).plan == save_plan(request, two).plan == read_plan(tmp_path)


def test_images_that_another_process_has_just_appended_are_kept(tmp_path: Path) -> None:
    load(tmp_path, make_images(10))
    request = append_request(tmp_path, make_images(14))
    resolved = resolve_plan(request)
    load(tmp_path, make_images(12), append=True)
    saved = save_plan(request, resolved)
    assert read_plan(tmp_path) == saved.plan
    assert [part.images for part in saved.plan.lists] == [10, 2, 2]


def test_a_plan_that_other_processes_keep_changing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path, make_images(10))
    request = append_request(tmp_path, make_images(12))
    resolved = resolve_plan(request)
    monkeypatch.setattr("gridcap.extract.planning._write", lambda *_: False)
    with pytest.raises(MismatchError, match="other processes keep changing"):
        save_plan(request, resolved)


def test_resolving_an_append_writes_nothing(tmp_path: Path) -> None:
    first = load(tmp_path, make_images(10))
    before = sorted(p.name for p in tmp_path.iterdir())
    requested = make_plan("train", make_images(12), 4, 2, PROVENANCE)
    assert resolve_plan(PlanRequest(requested, make_images(12), tmp_path, append=True)).plan.images == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert read_plan(tmp_path) == first
