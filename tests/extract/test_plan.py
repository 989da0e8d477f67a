"""The plan: every image has one row, and the plan on disk is validated."""

from __future__ import annotations

from pathlib import Path

import pytest

from gridcap.common.errors import StoreError
from gridcap.extract.plan import read_plan
from tests.extract.planning_helpers import PROVENANCE, all_images, make_images, make_plan, plan


@pytest.mark.parametrize(
    ("images", "shard_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 1, [1]), (5, 1, [1, 1, 1, 1, 1]), (4, 1024, [4])],
)
def test_all_shards_but_the_last_are_full(images: int, shard_size: int, sizes: list[int]) -> None:
    made = plan(images, shard_size)
    assert made.shards == len(sizes)
    assert [len(made.rows_of(s)) for s in range(made.shards)] == sizes
    assert [row for s in range(made.shards) for row in made.rows_of(s)] == list(range(images))


def test_a_folder_has_at_most_a_thousand_shards() -> None:
    made = plan(12_345, 1)
    names = [made.shard_name(s) for s in range(made.shards)]
    assert len(set(names)) == 12_345
    assert names[:2] == ["00000.h5", "00001.h5"]
    assert (names[999], names[1000], names[12_344]) == ("00999.h5", "001/01000.h5", "012/12344.h5")


def test_existing_shards_lists_all_folders_and_ignores_other_files(tmp_path: Path) -> None:
    made = plan(2500, 1)
    for name in ("00000.h5", "00999.h5", "001/01000.h5", "002/02499.h5", "002/02500.h5", ".00001.h5.tmp", "x.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert made.existing_shards(tmp_path) == [0, 999, 1000, 2499]
    assert made.existing_shards(tmp_path / "nothing") == []


def test_a_plan_survives_a_round_trip_to_disk(tmp_path: Path) -> None:
    made = plan(folder=tmp_path)
    (tmp_path / "plan.json").write_text(made.to_json(), encoding="utf-8")
    back = read_plan(tmp_path)
    assert back == made
    assert back.digest() == made.digest()
    assert back.to_json() == made.to_json()
    assert all_images(back, tmp_path) == make_images(10)


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    turned = dict(reversed(PROVENANCE.items()))
    assert make_plan("train", make_images(10), 4, 2, turned).digest() == plan().digest()


def test_the_digest_depends_on_everything_in_the_plan() -> None:
    made = plan()
    others = [
        plan(11),
        plan(shard_size=5),
        plan(batch_size=3),
        plan(dtype="float32"),
        make_plan("val", make_images(10), 4, 2, PROVENANCE),
        make_plan("train", make_images(10)[::-1], 4, 2, PROVENANCE),
        make_plan("train", [(i + 1, name) for i, name in make_images(10)], 4, 2, PROVENANCE),
    ]
    assert len({made.digest(), *(other.digest() for other in others)}) == len(others) + 1


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
def test_a_corrupted_plan_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(StoreError, match="not a valid plan") as caught:
        read_plan(tmp_path)
    assert str(tmp_path / "plan.json") in caught.value.message


def test_a_plan_of_another_version_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan().to_json().replace('"version": 2', '"version": 99'))
    with pytest.raises(StoreError, match="version"):
        read_plan(tmp_path)


def test_a_missing_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file"):
        read_plan(tmp_path)
