"""What a worker makes: views, 8 bits, and rejected images tried again; the stages themselves are in test_run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from gridcap.common.captions.folder import list_images
from gridcap.common.errors import ExtractionError, StoreError
from gridcap.common.store.quantize import as_stored
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard import read_header
from gridcap.extract.cluster.share import Share
from gridcap.extract.run import extract_features


def wanted(fake: Any, folder: Path, flip: bool = False) -> np.ndarray:
    """What the encoder gives for each picture of a folder, in the order of their names."""
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return np.concatenate([fake.grids(np.ascontiguousarray(p[:, ::-1] if flip else p)) for p in pictures])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def repair_picture(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(path)


# ------------------------------------------------------------------------------------------------------------ views


def test_the_mirrored_view_is_the_grid_of_the_mirrored_image(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(7)
    job, _ = extracted(folder, extract__views="original,hflip", extract__shard_size=3, extract__batch_size=2)
    with FeatureStore(job.output) as store:
        assert store.views == ("original", "hflip")
        np.testing.assert_array_equal(store.rows(range(7)), wanted(fake, folder).astype("f2"))
        mirrored = wanted(fake, folder, flip=True).astype("f2")
        np.testing.assert_array_equal(store.rows(range(7), views=[1] * 7), mirrored)
        np.testing.assert_array_equal(store.row(5, "hflip"), mirrored[5])
        mixed = store.rows([4, 4, 2], views=np.array([1, 0, 1]))
        np.testing.assert_array_equal(mixed, [mirrored[4], store.row(4), mirrored[2]])


def test_a_store_without_a_view_refuses_it(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(2))
    with FeatureStore(job.output) as store, pytest.raises(IndexError):
        store.rows([0], views=[1])


def test_a_rejected_image_is_rejected_in_every_view(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(5, bad={2: "text"})
    job, _ = extracted(folder, extract__views="original,hflip", extract__shard_size=3)
    with FeatureStore(job.output) as store:
        assert list(store.rejects) == [2]
        assert np.isnan(store.row(2)).all()
        assert np.isnan(store.row(2, "hflip")).all()
        assert not np.isnan(store.row(3, "hflip")).any()


# ----------------------------------------------------------------------------------------------------------- uint8


def test_eight_bits_come_back_as_they_are_quantised(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(5, bad={1: "text"})
    job, _ = extracted(folder, extract__dtype="uint8", extract__shard_size=2, extract__views="original,hflip")
    exact = wanted_without(fake, folder, 1)
    with FeatureStore(job.output) as store:
        assert store.dtype == np.float16
        got = store.rows([0, 2, 3, 4])
        np.testing.assert_array_equal(got, as_stored(exact.astype("f2"), np.dtype("u1")))
        assert np.abs(got - exact).max() <= 0.6 * exact.max() / 255
        assert np.isnan(store.row(1)).all()
        assert np.isnan(store.row(1, "hflip")).all()


def wanted_without(fake: Any, folder: Path, row: int) -> np.ndarray:
    names = [r.file_name for i, r in enumerate(list_images(folder).records) if i != row]
    return np.concatenate([fake.grids(np.asarray(Image.open(folder / name))) for name in names])


# ----------------------------------------------------------------------------------------------- rejects, once more


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_retried_images_give_the_store_that_was_good_from_the_start(
    fake: Any, photos: Any, job: Any, tmp_path: Path, dtype: str
) -> None:
    keys = {"extract__shard_size": 4, "extract__batch_size": 2, "extract__dtype": dtype}
    keys["extract__views"] = "original,hflip"
    folder = photos(11, bad={1: "text", 2: "text", 9: "text", 10: ""})
    prepared = job(folder, tmp_path / "retried" / "s.h5", **keys, data__max_invalid="50%")
    assert extract_features(prepared, show_progress=False).invalid.total() == 4
    untouched = (prepared.folder / "00001.h5").stat().st_mtime_ns
    for i in (1, 9):
        repair_picture(folder / f"{i:04}.png", i)
    fake.batches.clear()
    summary = extract_features(prepared, show_progress=False, retry=True)
    assert (summary.retried, summary.written, summary.complete) == (2, 0, True)
    assert summary.invalid == {"not an image": 1, "empty file": 1}
    assert sum(fake.batches) <= 2 * 2 * 2, "two batches of two, each in two views"
    assert (prepared.folder / "00001.h5").stat().st_mtime_ns == untouched

    fresh = job(folder, tmp_path / "fresh" / "s.h5", **keys, data__max_invalid="50%")
    extract_features(fresh, show_progress=False)
    assert contents(tmp_path / "retried") == contents(tmp_path / "fresh")


def test_retrying_what_is_still_bad_changes_nothing(fake: Any, photos: Any, job: Any) -> None:
    prepared = job(photos(6, bad={4: "text"}), extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    before = contents(prepared.output.parent)
    built = fake.built
    summary = extract_features(prepared, show_progress=False, retry=True)
    assert (summary.retried, summary.invalid.total()) == (0, 1)
    assert contents(prepared.output.parent) == before
    assert fake.built == built + 1


def test_a_new_reason_replaces_the_old_one(fake: Any, photos: Any, job: Any) -> None:
    folder = photos(6, bad={4: "text"})
    prepared = job(folder, extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    (folder / "0004.png").unlink()
    extract_features(prepared, show_progress=False, retry=True)
    with FeatureStore(prepared.output) as store:
        assert store.rejects == {4: "missing"}


def test_killed_between_a_retried_shard_and_the_index_a_rerun_completes_the_store(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(6, bad={4: "text"})
    prepared = job(folder, extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    repair_picture(folder / "0004.png", 1)
    with monkeypatch.context() as patch:
        patch.setattr("gridcap.extract.indexing.write_planned_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_features(prepared, show_progress=False, retry=True)
    assert not prepared.output.exists(), "the old index has the old shard's hash"
    assert extract_features(prepared, show_progress=False).complete
    with FeatureStore(prepared.output) as store:
        assert store.valid.all()
    info = read_header(prepared.folder / "00001.h5")
    assert info is not None
    assert info.rejected == 0


def test_the_summary_counts_what_went_through_the_encoder(fake: Any, photos: Any, extracted: Any) -> None:
    _, summary = extracted(photos(7), extract__batch_size=2)
    assert summary.encoded == 7
    assert 0 < summary.waiting < summary.running <= summary.seconds


def test_a_damaged_row_is_not_copied_into_a_shard_that_vouches_for_it(fake: Any, photos: Any, job: Any) -> None:
    folder = photos(4, bad={1: "text"})
    prepared = job(folder, data__max_invalid="50%")
    extract_features(prepared, show_progress=False)
    shard = prepared.folder / "00000.h5"
    with h5py.File(shard) as file:
        place = file["features"].id.get_offset() + 3 * 2 * 2 * 3 * 2
    content = bytearray(shard.read_bytes())
    content[place] ^= 4
    shard.write_bytes(content)
    repair_picture(folder / "0001.png", 1)
    with pytest.raises(StoreError, match="row 3 is damaged"):
        extract_features(prepared, show_progress=False, retry=True)
    assert shard.read_bytes() == content, "and is left as it is, to be found by verify-features"


def test_workers_that_retry_at_once_all_end_well(fake: Any, photos: Any, job: Any, tmp_path: Path) -> None:
    folder = photos(24, bad=dict.fromkeys(range(0, 24, 3), "text"))
    keys = {"extract__shard_size": 2, "data__max_invalid": "50%"}
    prepared = job(folder, tmp_path / "retried" / "s.h5", **keys)
    extract_features(prepared, show_progress=False)
    for i in range(0, 24, 3):
        repair_picture(folder / f"{i:04}.png", i)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(extract_features, prepared, Share(i, 3), show_progress=False, retry=True) for i in range(3)]
        assert sum(run.result().retried for run in runs) == 8
    assert extract_features(prepared, show_progress=False).complete
    fresh = job(folder, tmp_path / "fresh" / "s.h5", **keys)
    extract_features(fresh, show_progress=False)
    assert contents(tmp_path / "retried") == contents(tmp_path / "fresh")


def test_a_retried_value_that_cannot_be_stored_names_its_image(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(3, bad={1: "text"})
    prepared = job(folder, data__max_invalid="50%")
    extract_features(prepared, show_progress=False)
    repair_picture(folder / "0001.png", 1)
    monkeypatch.setattr(fake, "encode", lambda self, images: np.full((len(images), 2, 2, 3), np.inf, "f2"))
    with pytest.raises(ExtractionError, match=r"0001\.png"):
        extract_features(prepared, show_progress=False, retry=True)
