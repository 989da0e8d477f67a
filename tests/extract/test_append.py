"""--append: in every order of adding images, removing images, kills, and reruns, the store can be completed."""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from PIL import Image

from gridcap.common.captions.images import list_images
from gridcap.common.config import load_config
from gridcap.common.errors import MismatchError
from gridcap.common.store.reader import FeatureStore
from gridcap.extract import planning
from gridcap.extract.cluster.share import Share
from gridcap.extract.job import Extraction, ExtractionRequest, prepare
from gridcap.extract.run import extract_features
from tests.extract.cli_helpers import SMALL, fails, files, run
from tests.extract.store_helpers import assert_matches_photos, write_image


def test_item_05_append_succeeds_if_images_were_also_removed(
    fake: Any, photos: Any, no_launcher: Any, tmp_path: Path
) -> None:
    folder = photos(4)
    assert run("--images", folder, *SMALL).exit_code == 0
    (folder / "0001.png").unlink()
    for i in (7, 8, 9):
        write_image(folder / f"{i:04}.png", i)
    before = files(tmp_path)
    dry = run("--images", folder, *SMALL, "--append", "--dry-run")
    assert "to append: 3 images to the existing 4" in dry.stdout, dry.output
    assert files(tmp_path) == before
    for _ in range(2):
        result = run("--images", folder, *SMALL, "--append")
        assert result.exit_code == 0, result.output
    with FeatureStore(tmp_path / "features" / "photos.h5") as store:
        assert store.file_name == [f"{i:04}.png" for i in (0, 1, 2, 3, 7, 8, 9)]
        assert store.valid.all(), "the row of the removed image is kept"


def test_item_05_append_to_an_unfinished_store_keeps_the_rows_of_removed_images(
    fake: Any, photos: Any, job: Any
) -> None:
    folder = photos(6)
    keys = {"extract__shard_size": 2, "data__max_invalid": "50%"}
    extract_features(job(folder, **keys), Share(0, 2), show_progress=False)
    (folder / "0002.png").unlink()  # in the missing shard
    write_image(folder / "0009.png", 9)
    for _ in range(2):
        appended = job(folder, append=True, **keys)
        extract_features(appended, show_progress=False)
    with FeatureStore(appended.output) as store:
        assert store.file_name == [f"{i:04}.png" for i in (0, 1, 2, 3, 4, 5, 9)]
        assert (~store.valid).nonzero()[0].tolist() == [2]


def test_item_05_a_list_of_other_images_is_rejected_before_anything_is_written(
    fake: Any, photos: Any, job: Any
) -> None:
    folder, other = photos(4), photos(4, name="other")
    for path in sorted(other.iterdir()):
        path.rename(other / f"other-{path.name}")
    first = job(folder, extract__shard_size=2)
    extract_features(first, Share(0, 2), show_progress=False)
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    with pytest.raises(MismatchError, match="1 shard unfinished, and 2 images of them") as caught:
        job(other, append=True, extract__shard_size=2)
    assert "--max-invalid" in caught.value.hint
    assert {path: path.read_bytes() for path in first.folder.iterdir()} == before


def test_item_13_processes_that_append_the_same_images_at_once_complete_the_store(
    fake: Any, photos: Any, job: Any
) -> None:
    folder = photos(4)
    extract_features(job(folder, extract__shard_size=2), show_progress=False)
    for i in range(4, 12):
        write_image(folder / f"{i:04}.png", i)
    prepared = [job(folder, append=True, extract__shard_size=2) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(extract_features, extraction, Share(rank, 3), show_progress=False)
            for rank, extraction in enumerate(prepared)
        ]
        assert any(run.result().complete for run in runs)
    assert_matches_photos(fake, folder, prepared[0].output)


@pytest.mark.parametrize("newer_first", [False, True])
def test_item_13_processes_that_append_different_images_at_once_add_both(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch, newer_first: bool
) -> None:
    """Without a lock, both would compare with the same plan, and one of them would overwrite the plan of the other."""
    folder = photos(4)
    extract_features(job(folder, extract__shard_size=2), show_progress=False)
    prepared = []
    for i in (4, 5):
        write_image(folder / f"{i:04}.png", i)
        records = [
            r for r in list_images(folder).records if r.file_name not in {"0004.png", "0005.png"} - {f"{i:04}.png"}
        ]
        prepared.append(job(folder, records=records, append=True, extract__shard_size=2))
    read = planning.read_plan

    def read_slowly(folder: Path) -> Any:
        plan = read(folder)
        time.sleep(0.1)
        return plan

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(planning, "read_plan", read_slowly)
        saved = [*pool.map(Extraction.save, prepared)]
    assert sorted(extraction.plan.images for extraction in saved) == [5, 6]
    for extraction in sorted(saved, key=lambda extraction: extraction.plan.images, reverse=newer_first):
        extract_features(extraction, show_progress=False)
    with FeatureStore(prepared[0].output) as store:
        assert sorted(store.file_name) == [f"{i:04}.png" for i in range(6)]
        assert store.valid.all()


class ImageFolderChanges(RuleBasedStateMachine):
    """Adds and removes images, and runs extract-features --append, killed at any batch or to the end."""

    fake: Any

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.photos = self.root / "photos"
        self.photos.mkdir()
        self.count = 0
        self.rows: list[str] = []
        self.complete = False
        self.add(2)

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(count=st.integers(1, 3))
    def add(self, count: int) -> None:
        for _ in range(count):
            # Names in any order, so that new images sort between existing ones.
            write_image(self.photos / f"{self.count * 7 % 10}-{self.count}.png", self.count)
            self.count += 1
        self.complete = False

    @precondition(lambda self: len(self.images()) > 1)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        (self.photos / data.draw(st.sampled_from(self.images()))).unlink()

    @rule(batch=st.integers(0, 3))
    def run_until_killed(self, batch: int) -> None:
        left = [batch]
        encode = self.fake.encode

        def interrupt(encoder: Any, images: np.ndarray) -> np.ndarray:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            grids: np.ndarray = encode(encoder, images)
            return grids

        self.fake.encode = interrupt
        try:
            self.extract()
        except KeyboardInterrupt:
            self.complete = False
        finally:
            self.fake.encode = encode

    @rule()
    def extract(self) -> None:
        extraction = self.prepare()
        assert extract_features(extraction, show_progress=False).complete
        with FeatureStore(extraction.output) as store:
            assert store.file_name[: len(self.rows)] == self.rows, "rows never move"
            self.rows = list(store.file_name)
            valid = [name for name, is_valid in zip(store.file_name, store.valid, strict=True) if is_valid]
            for row in store.valid.nonzero()[0].tolist():
                seed = int(store.file_name[row].rpartition("-")[2].removesuffix(".png"))
                pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
                np.testing.assert_array_equal(store[row], self.fake.grids(pixels)[0].astype("f2"))
        assert set(self.images()) <= set(valid)
        self.complete = True

    @invariant()
    def a_complete_store_needs_no_work(self) -> None:
        if self.complete:
            assert self.prepare().resolved.is_saved

    def images(self) -> list[str]:
        return sorted(path.name for path in self.photos.iterdir())

    def prepare(self) -> Extraction:
        keys = {"extract.weights": "random", "extract.precision": "float32", "data.max_invalid": "100%"}
        config = load_config(None, {**keys, "extract.shard_size": 2, "extract.batch_size": 2})
        records, output = list_images(self.photos).records, self.root / "features" / "s.h5"
        return prepare(ExtractionRequest(config, "s", records, self.photos, output, append=True, replace_empty=True))


def test_item_05_any_order_of_adding_removing_and_kills_leads_to_a_complete_store(fake: Any) -> None:
    class Machine(ImageFolderChanges):
        pass

    Machine.fake = fake
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# A different plan without shards is replaced


def test_item_25_a_corrected_list_replaces_a_plan_without_shards(
    fake: Any, photos: Any, no_launcher: Any, tmp_path: Path
) -> None:
    folder = photos(4)
    captions = tmp_path / "captions.csv"
    captions.write_text("image,caption\n" + "".join(f"wrong-{i}.png,a photo\n" for i in range(4)))
    arguments = ("--images", folder, "--annotations", captions, *SMALL)
    assert "of 4 images are invalid" in fails(1, *arguments)
    captions.write_text("image,caption\n" + "".join(f"{i:04}.png,a photo\n" for i in range(4)))
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "replacing a different plan, which has no shards yet" in result.stderr
    manifests = list((tmp_path / "features" / "photos").glob("images-*.jsonl"))
    assert len(manifests) == 1, "the list of the replaced plan is removed"


def test_item_25_a_plan_with_a_shard_is_not_replaced(fake: Any, photos: Any, no_launcher: Any) -> None:
    folder = photos(4)
    assert run("--images", folder, *SMALL, "--rank", 0, "--world-size", 2).exit_code == 0
    (folder / "0003.png").unlink()
    assert "0 new, 1 gone" in fails(1, "--images", folder, *SMALL)


def test_item_25_one_of_several_processes_does_not_replace_a_plan(fake: Any, photos: Any, no_launcher: Any) -> None:
    folder = photos(4)
    run("--images", folder, *SMALL, "--rank", 3, "--world-size", 4)
    (folder / "0003.png").unlink()
    assert "0 new, 1 gone" in fails(1, "--images", folder, *SMALL, "--rank", 3, "--world-size", 4)


def test_item_25_a_run_whose_plan_was_replaced_writes_no_shard(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(4)
    first = job(folder, extract__shard_size=2).save()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "0005.png")
    request = ExtractionRequest(
        first.config, "s", list_images(folder).records, folder, first.output, replace_empty=True
    )
    second = prepare(request).save()
    assert second.plan.images == 5
    monkeypatch.setattr(Extraction, "save", lambda self: self)  # as if the first run had already started
    with pytest.raises(MismatchError, match="another process has replaced the plan"):
        extract_features(first, show_progress=False)
    assert second.plan.existing_shards(second.folder) == []
