"""Verification finds and names corruption; repair deletes it, so that a rerun restores the store."""

from __future__ import annotations

import dataclasses
import errno
import json
import zlib
from pathlib import Path
from typing import Any

import click.testing
import h5py
import numpy as np
import pytest

import gridcap.extract.verify as verify_module
from gridcap.common.errors import StoreAccessError, StoreError
from gridcap.common.store.header import HEADER_BYTES
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.system_error import store_error_from
from gridcap.extract import manifest as image_list
from gridcap.extract.manifest import ImageList
from gridcap.extract.plan import Plan, read_plan, shard_writer, write_planned_index
from gridcap.extract.repair import repair_store
from gridcap.extract.store_cli import verify_features
from gridcap.extract.verify import Report, verify_store

GRID = (2, 2, 4)
PROVENANCE = {"encoder": "fake", "grid_shape": list(GRID), "dtype": "float16", "views": ["original"]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path, PROVENANCE)


def write_store(tmp_path: Path, provenance: dict[str, Any]) -> Path:
    """Write seven images in three shards; image 3 is invalid."""
    images = [(100 + i, f"{i}.jpg") for i in range(7)]
    folder = tmp_path / "s"
    plan = Plan("s", 3, 3, provenance, (ImageList.from_images(images, 3, folder),))
    (folder / "plan.json").write_text(plan.to_json())
    rng = np.random.default_rng(0)
    for shard in range(plan.shards):
        with shard_writer(folder, plan, shard) as writer:
            rows = len(plan.rows_of(shard))
            writer.write(0, rng.random((rows, *GRID)).astype("f2"), {0: "missing"} if shard == 1 else {})
            writer.finish()
    write_planned_index(tmp_path / "s.h5", plan)
    return tmp_path / "s.h5"


def problems(report: Report) -> set[tuple[str, str]]:
    return {(problem.check, problem.shard) for problem in report.problems}


def shard(store: Path, number: int) -> Path:
    return store.with_suffix("") / f"{number:05}.h5"


def test_an_intact_store_has_no_problems(store: Path) -> None:
    rows: list[int] = []
    report = verify_store(store, range(100, 107), rows.append)
    assert not report.problems
    assert (report.rows, report.valid) == (7, 6)
    assert rows == [3, 3, 1]
    assert report.checked["row CRC-32"] == 7
    assert report.checked["whole-file SHA-256"] == 4, "three shards and the index"


def test_a_flipped_bit_in_a_grid_is_found_by_row_and_file_checksums(store: Path) -> None:
    path = shard(store, 0)
    with h5py.File(path) as file:
        offset = file["features"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + 32 + 5] ^= 1  # the second row: a row has 32 bytes
    path.write_bytes(data)
    report = verify_store(store)
    assert problems(report) == {("whole-file SHA-256", path.name), ("row CRC-32", path.name)}
    assert any("rows [1]" in problem.detail for problem in report.problems)


def test_a_flipped_bit_anywhere_else_in_the_file_is_found(store: Path) -> None:
    path = shard(store, 2)
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert path.name in {name for _, name in problems(verify_store(store))}, position


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_implausible_rows_with_matching_checksums_are_found(store: Path, value: float) -> None:
    path = shard(store, 0)
    with h5py.File(path, "r+") as file:
        row = np.full(GRID, value, "f2")
        file["features"][2] = row
        file["crc32"][2] = zlib.crc32(row.data)
    check = "no row all zero" if value == 0 else "no NaN or infinity"
    assert (check, path.name) in problems(verify_store(store))


def test_a_missing_and_a_truncated_shard_are_named(store: Path) -> None:
    shard(store, 0).unlink()
    path = shard(store, 1)
    path.write_bytes(path.read_bytes()[:-4000])
    assert problems(verify_store(store)) == {("shard readable", "00000.h5"), ("shard readable", "00001.h5")}


def test_exchanged_shards_are_found(store: Path) -> None:
    first, second = shard(store, 0).read_bytes(), shard(store, 1).read_bytes()
    shard(store, 0).write_bytes(second)
    shard(store, 1).write_bytes(first)
    assert {name for _, name in problems(verify_store(store))} == {"00000.h5", "00001.h5"}


def test_shards_are_checked_without_an_index(store: Path) -> None:
    store.unlink()
    report = verify_store(store)
    assert report.rows == 7
    assert any("incomplete" in problem.detail for problem in report.problems)


def test_item_13_an_index_deleted_during_verification_means_incomplete(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_index = verify_module.read_index

    def delete_and_read(path: Path) -> Any:
        path.unlink()
        return read_index(path)

    monkeypatch.setattr(verify_module, "read_index", delete_and_read)
    report = verify_store(store)
    assert [problem.check for problem in report.problems] == [verify_module.INDEX_CHECK]
    assert "incomplete" in report.problems[0].detail


@pytest.mark.parametrize(("encoder", "command"), [("imported", "gridcap import"), ("fake", "gridcap extract")])
@pytest.mark.parametrize("flags", [(), ("--repair",)])
def test_item_23_repair_names_the_command_that_wrote_the_store(
    tmp_path: Path, encoder: str, command: str, flags: tuple[str, ...]
) -> None:
    path = write_store(tmp_path, {**PROVENANCE, "encoder": encoder})
    shard(path, 2).write_bytes(b"garbage")
    result = click.testing.CliRunner().invoke(verify_features, [str(path), *flags])
    assert result.exit_code == 1
    assert {name for name in ("gridcap import", "gridcap extract") if name in result.output} == {command}


def test_image_ids_are_compared_with_the_captions_file(store: Path) -> None:
    report = verify_store(store, range(101, 109))
    assert [problem.detail for problem in report.problems] == [
        "2 images of the captions file missing in the store, 1 image of the store missing in the captions file"
    ]
    assert repair_store(store, report) == [], "other captions are not corruption"
    assert store.exists()


def test_repair_deletes_the_index_and_corrupted_shards_only(store: Path) -> None:
    shard(store, 1).write_bytes(b"garbage")
    removed = repair_store(store, verify_store(store))
    assert set(removed) == {store, shard(store, 1)}
    assert not store.exists()
    assert not shard(store, 1).exists()
    with ShardReader(shard(store, 0)) as reader:
        assert reader.corrupted_rows() == []


def test_item_11_an_intact_shard_with_an_all_zero_grid_is_not_deleted(tmp_path: Path) -> None:
    """Recreating the shard would give the same grid."""
    path = write_store(tmp_path, PROVENANCE)
    plan = read_plan(path.with_suffix(""))
    with shard_writer(path.with_suffix(""), plan, 2) as writer:
        writer.write(0, np.zeros((1, *GRID), "f2"), {})
        writer.finish()
    write_planned_index(path, plan)
    assert problems(verify_store(path)) == {("no row all zero", "00002.h5")}
    result = click.testing.CliRunner().invoke(verify_features, [str(path), "--repair"])
    assert result.exit_code == 1
    assert "deleted" not in result.output
    assert "rerun" not in result.output
    assert shard(path, 2).exists()
    assert path.exists()


def test_an_incomplete_store_without_corrupted_files_does_not_suggest_repair(store: Path) -> None:
    store.unlink()
    result = click.testing.CliRunner().invoke(verify_features, [str(store)])
    assert result.exit_code == 1
    assert "--repair" not in result.output
    assert "rerun the gridcap extract command" in result.output


def test_a_store_without_a_plan_raises(tmp_path: Path) -> None:
    (tmp_path / "notes.h5").write_text("hello")
    with pytest.raises(StoreError, match=r"plan\.json"):
        verify_store(tmp_path / "notes.h5")


def test_a_missing_store_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere\.h5: no such file"):
        verify_store(tmp_path / "nowhere.h5")
    with pytest.raises(StoreError, match="is a folder"):
        verify_store(tmp_path)


def test_the_command_prints_a_table_and_exits_with_1_for_problems(store: Path, tmp_path: Path) -> None:
    run = click.testing.CliRunner().invoke
    captions = tmp_path / "captions.json"
    images = [{"id": 100 + i, "file_name": f"{i}.jpg"} for i in range(7)]
    captions.write_text(json.dumps({"images": images, "annotations": []}))
    intact = run(verify_features, [str(store), "--annotations", str(captions)])
    assert intact.exit_code == 0, intact.output
    assert "no problems" in intact.output
    assert "7 rows, 6 valid" in intact.output
    shard(store, 2).write_bytes(b"garbage")
    corrupted = run(verify_features, [str(store)])
    assert corrupted.exit_code == 1
    assert "00002.h5" in corrupted.output
    assert store.exists(), "nothing is deleted without --repair"
    repaired = run(verify_features, [str(store), "--repair"])
    assert repaired.exit_code == 1
    assert "deleted" in repaired.output
    assert not store.exists()


# ------------------------------------------------------------------------------- repair deletes nothing intact


def test_a_missing_image_list_is_not_blamed_on_the_shards(store: Path) -> None:
    next(store.with_suffix("").glob("images-*.jsonl")).unlink()
    image_list._read_lines.cache_clear()  # as in another process
    with pytest.raises(StoreError, match="no such file"):
        verify_store(store)


def test_a_stale_index_is_deleted_and_its_newer_shard_is_kept(store: Path) -> None:
    """After a retry of invalid images, another worker's index may be older than the shards."""
    folder = store.with_suffix("")
    plan = read_plan(folder)
    with shard_writer(folder, plan, 1) as writer:
        writer.write(0, np.ones((3, *GRID), "f2"), {})
        writer.finish()
    report = verify_store(store)
    assert {(p.check, p.shard) for p in report.problems} == {("belongs to the plan", "")}
    assert "00001.h5" in report.problems[0].detail
    assert repair_store(store, report) == [store]
    write_planned_index(store, plan)
    assert not verify_store(store).problems


@pytest.mark.parametrize("column", ["valid", "image_id", "shard_rows", "invalid_row"])
def test_a_corrupted_index_is_deleted_and_shards_are_kept(store: Path, column: str) -> None:
    with h5py.File(store) as file:
        offset = file[column].id.get_offset()
    content = bytearray(store.read_bytes())
    content[offset] ^= 1
    store.write_bytes(content)
    report = verify_store(store)
    assert ("whole-file SHA-256", "") in problems(report)
    assert repair_store(store, report) == [store]


def test_during_an_append_the_older_index_is_kept(store: Path) -> None:
    folder = store.with_suffix("")
    plan = read_plan(folder)
    more = ImageList.from_images([(200, "later.jpg")], 3, folder)
    (folder / "plan.json").write_text(dataclasses.replace(plan, lists=(*plan.lists, more)).to_json())
    report = verify_store(store)
    assert problems(report) == {("index complete", ""), ("shard readable", "00003.h5")}
    assert repair_store(store, dataclasses.replace(report, problems=report.problems[:1])) == []
    assert store.exists()


def test_item_11_shard_that_cannot_be_read_is_not_reported_as_corrupted(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--repair deletes corrupted shards, but this one may be intact."""

    def fail(path: Path) -> None:
        raise store_error_from(OSError(errno.EIO, "Input/output error"), path)

    monkeypatch.setattr("gridcap.extract.verify.read_header", fail)
    with pytest.raises(StoreAccessError, match=r"0000\d\.h5: input/output error"):
        verify_store(store)


def test_item_11_store_of_another_format_version_is_not_reported_as_corrupted(store: Path) -> None:
    """--repair must not delete a store only because another version of gridcap wrote it."""
    for path in (store.with_suffix("") / "00000.h5", store):
        with path.open("r+b") as file:
            block = file.read(HEADER_BYTES)
            file.seek(0)
            file.write(block.replace(b'"version": 3', b'"version": 2'))
        with pytest.raises(StoreAccessError, match="format version 2"):
            verify_store(store)
