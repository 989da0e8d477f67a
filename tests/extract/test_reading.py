"""The read stage: input/output errors name the image, and transient ones are retried."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gridcap.extract.reading as reading_module
from gridcap.common import retry
from gridcap.common.errors import ExtractionError
from gridcap.common.image import load_image
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.run import extract_features
from tests.extract.cli_helpers import SMALL, fails
from tests.extract.store_helpers import assert_matches_photos, no_temporaries


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "DELAY", 0)


def failing_reads(monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int) -> list[Path]:
    """Make the first `times` reads of an image raise an OSError without a file name; return its reads."""
    real, reads = reading_module.load_image, []

    def load(path: Path, *arguments: Any) -> np.ndarray:
        if path.name == name:
            reads.append(path)
            if len(reads) <= times:
                raise OSError(number, os.strerror(number))
        return real(path, *arguments)

    monkeypatch.setattr(reading_module, "load_image", load)
    return reads


@pytest.mark.parametrize("scaled", [True, False])
def test_large_jpeg_files_are_decoded_as_the_provenance_says(fake: Any, job: Any, tmp_path: Path, scaled: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(noise).save(tmp_path / "photos" / "a.jpg")
    extraction = job(tmp_path / "photos", extract__jpeg_scaled_decoding=scaled, extract__dtype="float32")
    assert extraction.plan.provenance["preprocessing"]["jpeg_scaled_decoding"] is scaled
    extract_features(extraction, show_progress=False)
    full, reduced = (load_image(tmp_path / "photos" / "a.jpg", 16, "stretch", flag) for flag in (False, True))
    assert (full != reduced).any()
    with FeatureStore(extraction.output) as store:
        np.testing.assert_array_equal(store[0], fake.grids(reduced if scaled else full)[0].astype("f4"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH])
def test_item_23_a_transient_read_error_is_retried(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    reads = failing_reads(monkeypatch, "0003.png", number, retry.ATTEMPTS - 1)
    folder = photos(5)
    extraction, _ = extracted(folder)
    assert len(reads) == retry.ATTEMPTS
    assert_matches_photos(fake, folder, extraction.output)


def test_item_23_a_persistent_read_error_names_the_image(
    fake: Any, photos: Any, no_launcher: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads = failing_reads(monkeypatch, "0003.png", errno.EIO, 100)
    folder = photos(5)
    error = fails(1, "--images", folder, *SMALL)
    assert f"{folder / '0003.png'}: cannot be read: input/output error (5 attempts)" in error
    assert "check the disk or the network share" in error
    assert len(reads) == retry.ATTEMPTS
    assert no_temporaries(tmp_path / "features")


def test_item_23_an_error_that_does_not_pass_is_not_retried(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = failing_reads(monkeypatch, "0003.png", errno.EMFILE, 100)
    with pytest.raises(ExtractionError, match=r"0003\.png: cannot be read: too many open files$") as caught:
        extract_features(job(photos(5)), show_progress=False)
    assert "ulimit -n" in caught.value.hint
    assert len(reads) == 1
