"""libjpeg-turbo returns the pixels of Pillow, or leaves the file to Pillow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gridcap.extract.images.turbo as turbo_module
import gridcap.extract.reading as reading_module
from gridcap.common.image import InvalidImageError, load_rgb
from gridcap.extract.images.turbo import decode_turbo
from gridcap.extract.run import extract_features
from tests.extract.cli_helpers import RANDOM, fails, run
from tests.extract.store_helpers import contents

pytest.importorskip("simplejpeg")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    noise = np.random.default_rng(seed + 1).normal(0, 9, (height, width, 1))
    pixels = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 48), (77, 51), (641, 483), (8, 9), (1, 1)])
@pytest.mark.parametrize("min_side", [None, 16, 33, 100])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"quality": 20, "restart_marker_rows": 1},
        {"optimize": True, "dpi": (72, 72)},
    ],
)
def test_pixels_equal_pillows(
    tmp_path: Path, size: tuple[int, int], min_side: int | None, options: dict[str, Any]
) -> None:
    path = tmp_path / "a.jpg"
    photo(*size).save(path, **options)
    decoded = decode_turbo(path, min_side)
    assert decoded is not None
    np.testing.assert_array_equal(decoded, np.asarray(load_rgb(path, min_side)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_also_to_grayscale_and_reduced_images(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGB", "L"):
        photo(77, 51).convert(mode).save(tmp_path / "a.jpg", exif=exif)
        for min_side in (None, 20):
            decoded = decode_turbo(tmp_path / "a.jpg", min_side)
            assert decoded is not None
            assert decoded.flags.c_contiguous
            np.testing.assert_array_equal(decoded, np.asarray(load_rgb(tmp_path / "a.jpg", min_side)))


def test_other_files_are_left_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    photo(64, 48).save(buffer, "jpeg")
    data = buffer.getvalue()
    files = {
        "cut": data[: len(data) // 2],
        "cut and ended": data[: len(data) // 2] + b"\xff\xd9",
        "trailing": data + b"more",
        "empty": b"",
        "text": b"text",
        "garbage": data[:-300] + bytes(298) + b"\xff\xd9",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert decode_turbo(tmp_path / name, None) is None, name
    photo(64, 48).save(tmp_path / "a.png")
    photo(64, 48).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("a.png", "cmyk.jpg", "missing.jpg", "."):
        assert decode_turbo(tmp_path / name, None) is None, name
    (tmp_path / "a.jpg").write_bytes(data)
    monkeypatch.setattr(turbo_module, "SCANS_TIMES_PIXELS", 64 * 48 - 1)
    assert decode_turbo(tmp_path / "a.jpg", None) is None, "only Pillow has a time limit"


@pytest.mark.parametrize("at", [200, 700, 1200])
def test_a_corrupted_file_gives_pillows_result(tmp_path: Path, at: int) -> None:
    buffer = io.BytesIO()
    photo(64, 48).save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    data[at : at + 8] = b"\xff\x00\xd3\xff\xd7\x11\xff\x01"
    (tmp_path / "a.jpg").write_bytes(data)
    decoded = decode_turbo(tmp_path / "a.jpg", None)
    if decoded is not None:
        np.testing.assert_array_equal(decoded, np.asarray(load_rgb(tmp_path / "a.jpg")))


KEYS: dict[str, Any] = {"extract__shard_size": 4, "extract__batch_size": 3, "data__max_invalid": "90%"}


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    folder = tmp_path / "jpegs"
    folder.mkdir()
    for i in range(9):
        photo(100 + i, 90 - i, i).save(folder / f"{i}.jpg")
    (folder / "3.jpg").write_bytes((folder / "2.jpg").read_bytes()[:500])
    photo(40, 30).save(folder / "9.png")
    return folder


@pytest.mark.parametrize("more", [{}, {"extract__resize_mode": "crop"}, {"extract__views": "original,five-crop"}])
def test_stores_differ_in_the_recorded_library_only(
    fake: Any, jpegs: Path, job: Any, tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow = job(jpegs, tmp_path / "pillow" / "s.h5", extract__jpeg_decoder="pillow", **KEYS, **more)
    extract_features(pillow, show_progress=False)
    reads: list[str] = []
    real = reading_module.load_views if more.get("extract__views") else reading_module.load_image

    def load(path: Path, *arguments: Any) -> np.ndarray:
        reads.append(path.name)
        result: np.ndarray = real(path, *arguments)
        return result

    monkeypatch.setattr(reading_module, real.__name__, load)
    turbo = job(jpegs, tmp_path / "turbo" / "s.h5", **KEYS, **more)
    extract_features(turbo, show_progress=False)
    assert sorted(reads) == ["3.jpg", "9.png"], "Pillow decodes what is not an intact JPEG file"
    assert "simplejpeg" in turbo.plan.provenance["versions"]
    assert turbo.plan.provenance["preprocessing"] == pillow.plan.provenance["preprocessing"]
    for one, other in zip(sorted(pillow.folder.glob("*.h5")), sorted(turbo.folder.glob("*.h5")), strict=True):
        assert rows_of(one) == rows_of(other)


def rows_of(shard: Path) -> Any:
    from gridcap.common.store.shard_reader import ShardReader

    with ShardReader(shard) as reader:
        checksums = {view: crc.tolist() for view, crc in reader.checksums.items()}
        return checksums, reader.invalid_reasons, reader.valid.tolist()


def test_auto_follows_the_store_that_was_started(
    fake: Any, jpegs: Path, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that was started with Pillow is finished with Pillow, byte for byte."""
    for decoder in ("pillow", "turbo"):
        output = tmp_path / decoder / "s.h5"
        started = job(jpegs, output, extract__jpeg_decoder=decoder, **KEYS)
        extract_features(started, show_progress=False)
        before = contents(started.folder)
        (started.folder / "00001.h5").unlink()
        resumed = job(jpegs, output, **KEYS)
        assert resumed.plan.digest() == started.plan.digest()
        extract_features(resumed, show_progress=False)
        after = contents(started.folder)
        assert {name for name in before if before[name] != after[name]} <= {"config.yaml"}
    monkeypatch.setattr("gridcap.extract.images.turbo.has_turbo", lambda: False)
    assert job(jpegs, tmp_path / "turbo" / "s.h5", **KEYS).resolved.is_saved, "a complete store needs no decoder"


def test_a_missing_decoder_is_an_error(
    fake: Any, jpegs: Path, no_launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--images", jpegs, "--output", tmp_path / "s.h5", *RANDOM, "--max-invalid", "50%")
    assert run(*arguments).exit_code == 3
    provenance = json.loads((tmp_path / "s" / "plan.json").read_text())["provenance"]
    assert provenance["preprocessing"]["decoder"] == "pillow"
    (tmp_path / "s" / "00000.h5").unlink()
    message = fails(1, *arguments, "--jpeg-decoder", "pillow")
    assert "started with the JPEG decoder turbo, but this run uses pillow" in message
    monkeypatch.setattr("gridcap.extract.images.turbo.has_turbo", lambda: False)
    monkeypatch.setattr("gridcap.extract.images.decoders.has_turbo", lambda: False)
    for more in ((), ("--jpeg-decoder", "turbo")):
        assert "pip install 'gridcap[fast]'" in fails(2, *arguments, *more)
    assert run("--images", jpegs, "--output", tmp_path / "other.h5", *RANDOM, "--max-invalid", "50%").exit_code == 3
    assert "simplejpeg" not in (tmp_path / "other" / "plan.json").read_text()


def test_unreadable_files_are_reported_as_pillow_reports_them(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").mkdir()
    assert decode_turbo(tmp_path / "a.jpg", None) is None
    with pytest.raises(InvalidImageError, match="is a folder"):
        load_rgb(tmp_path / "a.jpg")
