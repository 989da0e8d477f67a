"""Batch decoding is close to Pillow's decoding, and marks the same images invalid for the same reasons.

torchvision decodes on the CPU through the same call as on a GPU, so everything but nvJPEG itself is tested anywhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gridcap.extract.images.nvjpeg as nvjpeg
from gridcap.common.errors import UserError
from gridcap.common.image import ImageReader, InvalidImageError, load_image
from gridcap.common.scenes import all_scenes, render
from gridcap.extract.images.nvjpeg import load_images_gpu, nvjpeg_name

CPU = torch.device("cpu")
DEVICES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(
        torch.device("cuda"),
        id="cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ),
]
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


def picture(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Return a non-square rendered scene in which adjacent pixel rows and columns differ."""
    scene = list(all_scenes())[seed]
    return Image.fromarray(np.asarray(render(scene, np.random.default_rng(seed), 128))).resize(size)


def by_pillow(path: Path, side: int, resize_mode: str) -> np.ndarray | str:
    try:
        return load_image(path, side, resize_mode)
    except InvalidImageError as error:
        return str(error)


def assert_as_pillow(
    paths: list[Path], device: torch.device, side: int = 64, resize_mode: str = "stretch", cut: str = ""
) -> None:
    """Assert that each image is within 1.5/255 of Pillow's on average, or invalid for the same reason and all zero.

    nvJPEG upsamples chroma differently, which matters for images this small, and fills the missing part of the file
    named `cut` differently. The CPU decodes as Pillow does and resizes within 0.2/255.
    """
    on_device, invalid = load_images_gpu(paths, side, resize_mode, device)
    assert on_device.shape == (len(paths), side, side, 3)
    assert (on_device.dtype, on_device.device.type) == (torch.uint8, device.type)
    squares = on_device.cpu().numpy()
    for position, path in enumerate(paths):
        expected = by_pillow(path, side, resize_mode)
        if isinstance(expected, str):
            assert invalid[position] == expected
            assert not squares[position].any()
        else:
            assert position not in invalid
            difference = abs(squares[position].astype(int) - expected)
            allowed = 0.5 if device == CPU else 30 if path.name == cut else 1.5
            assert difference.mean() < allowed, path.name


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the length of each list passed to torchvision."""
    sizes: list[int] = []
    real = nvjpeg.decode_jpeg

    def recording(data: list[torch.Tensor], *args: object) -> list[torch.Tensor]:
        sizes.append(len(data))
        return list(real(data, *args))

    monkeypatch.setattr(nvjpeg, "decode_jpeg", recording)
    return sizes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
def test_color_gray_and_progressive_files_of_any_size_are_decoded(
    tmp_path: Path, resize_mode: str, device: torch.device, decoded: list[int]
) -> None:
    picture(0).save(tmp_path / "a.jpg", quality=90)
    picture(1, (90, 130)).save(tmp_path / "b.jpg", quality=90, progressive=True)
    picture(2).convert("L").save(tmp_path / "c.jpg", quality=90)
    picture(3, (30, 40)).save(tmp_path / "d.jpg", quality=90)
    picture(4, (64, 64)).save(tmp_path / "e.jpg", quality=90, subsampling=0)
    picture(5, (1, 1)).save(tmp_path / "f.jpg", quality=90)
    assert_as_pillow(sorted(tmp_path.iterdir()), device, resize_mode=resize_mode)
    assert decoded == [6], "no file may go through Pillow"


@pytest.mark.parametrize("device", DEVICES)
def test_files_with_many_scans_and_named_pipes_are_left_to_pillow(
    tmp_path: Path, device: torch.device, decoded: list[int]
) -> None:
    picture(1).save(tmp_path / "a.jpg", progressive=True)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:-2] + 200 * whole[whole.rfind(b"\xff\xda") : -2] + whole[-2:])
    os.mkfifo(tmp_path / "b.jpg")
    assert_as_pillow(sorted(tmp_path.iterdir()), device)
    assert decoded == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(
    tmp_path: Path, orientation: int, device: torch.device, decoded: list[int]
) -> None:
    """The values 0 and 9 are undefined and ignored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(7).save(tmp_path / "phone.jpg", quality=95, subsampling=0, exif=exif)
    assert_as_pillow([tmp_path / "phone.jpg"], device, resize_mode="letterbox")
    assert decoded == [1]


@pytest.mark.parametrize("device", DEVICES)
def test_unsupported_formats_go_through_pillow(tmp_path: Path, device: torch.device, decoded: list[int]) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(1).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=90)
    picture(2).save(tmp_path / "c.webp")
    picture(3).save(tmp_path / "rgb.jpg", quality=90, keep_rgb=True)
    picture(4).save(tmp_path / "padded.jpg", quality=90)
    with (tmp_path / "padded.jpg").open("ab") as file:
        file.write(b"trailing data")
    paths = sorted(tmp_path.iterdir())
    squares, invalid = load_images_gpu(paths, 64, "stretch", device)
    assert invalid == {}
    assert decoded == []
    for square, path in zip(squares, paths, strict=True):
        np.testing.assert_array_equal(square.cpu(), load_image(path, 64, "stretch"))


@pytest.mark.parametrize("device", DEVICES)
def test_invalid_files_have_pillows_reasons_and_do_not_affect_others(tmp_path: Path, device: torch.device) -> None:
    picture(0).save(tmp_path / "a.jpg", quality=90)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jpg").touch()
    (tmp_path / "d.jpg").write_text("<html>404 not found</html>")
    (tmp_path / "e.jpg").mkdir()
    (tmp_path / "f.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    (tmp_path / "g.jpg").write_bytes(whole[:20] + whole[-2:])
    picture(1).save(tmp_path / "z.jpg", quality=90)
    assert_as_pillow([*sorted(tmp_path.iterdir()), tmp_path / "missing.jpg"], device, cut="f.jpg")


def test_only_files_that_torchvision_cannot_decode_go_through_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision fails for the whole list if one of its files is invalid."""
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    for i, path in enumerate(paths):
        picture(i).save(path, quality=90)
    unsupported = paths[2].stat().st_size
    real = nvjpeg.decode_jpeg
    sizes = []

    def failing(data: list[torch.Tensor], *args: object) -> object:
        sizes.append(len(data))
        if any(len(d) == unsupported for d in data):
            raise RuntimeError("nvjpegDecode failed: NVJPEG_STATUS_JPEG_NOT_SUPPORTED")
        return real(data, *args)

    monkeypatch.setattr(nvjpeg, "decode_jpeg", failing)
    assert_as_pillow(paths, CPU)
    assert sizes == [4, 1, 1, 1, 1]


def test_out_of_memory_does_not_mark_an_image_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise pixel values would depend on the free memory of the GPU."""

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    picture(0).save(tmp_path / "a.jpg")
    monkeypatch.setattr(nvjpeg, "decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_images_gpu([tmp_path / "a.jpg"], 64, "stretch", CPU)


@pytest.mark.parametrize(
    "decode", [lambda path: load_images_gpu([path], 64, "stretch", CPU), lambda path: load_image(path, 64, "stretch")]
)
def test_item_23_a_read_error_names_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: Callable[[Path], object]
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    picture(0).save(tmp_path / "a.jpg")
    monkeypatch.setattr(ImageReader, "open", fail)
    with pytest.raises(OSError, match=r"a\.jpg") as caught:
        decode(tmp_path / "a.jpg")
    assert caught.value.filename == str(tmp_path / "a.jpg")


def test_large_files_are_decoded_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]) -> None:
    paths = [tmp_path / f"{i}.jpg" for i in range(5)]
    for i, path in enumerate(paths):
        picture(i, (100, 100)).save(path, quality=90)
    monkeypatch.setattr(nvjpeg, "MAX_DECODED_PIXELS", 20_000)
    assert_as_pillow(paths, CPU)
    assert decoded == [2, 2, 1]


def test_an_empty_batch_is_allowed() -> None:
    squares, invalid = load_images_gpu([], 64, "stretch", CPU)
    assert squares.shape == (0, 64, 64, 3)
    assert invalid == {}


def test_orientation_in_xmp_is_left_to_pillow(tmp_path: Path, decoded: list[int]) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    picture(3, (70, 41)).save(tmp_path / "a.jpg", xmp=xmp)
    assert_as_pillow([tmp_path / "a.jpg"], CPU)
    assert decoded == []


def test_exif_in_two_segments_is_left_to_pillow(tmp_path: Path, decoded: list[int]) -> None:
    """Pillow joins them and uses the first orientation."""
    segments = []
    for orientation in (6, 3):
        exif = Image.Exif()
        exif[0x0112] = orientation
        segment = exif.tobytes()
        segments.append(b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment)
    picture(3, (70, 41)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:2] + b"".join(segments) + whole[2:])
    assert_as_pillow([tmp_path / "a.jpg"], CPU)
    assert decoded == []


@pytest.mark.parametrize("marker", [b"\xff\x02\x00\x04ab", b"\xff\x01", b"\xff\xd0"])
def test_markers_not_allowed_before_the_first_scan_are_left_to_pillow(
    tmp_path: Path, marker: bytes, decoded: list[int]
) -> None:
    picture(3).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:2] + marker + whole[2:])
    assert_as_pillow([tmp_path / "a.jpg"], CPU)
    assert decoded == []


def test_an_nvjpeg_allocation_failure_is_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("nvjpegDecodeBatched failed: NVJPEG_STATUS_ALLOCATOR_FAILURE")

    picture(0).save(tmp_path / "a.jpg")
    monkeypatch.setattr(nvjpeg, "decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError, match="nvJPEG"):
        load_images_gpu([tmp_path / "a.jpg"], 64, "stretch", CPU)


def test_nvjpeg_without_a_gpu_is_a_usage_error() -> None:
    with pytest.raises(UserError, match="--jpeg-decoder nvjpeg: needs an NVIDIA GPU") as caught:
        nvjpeg_name(CPU)
    assert "pillow" in caught.value.hint


def test_a_torchvision_without_nvjpeg_is_reported_before_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(nvjpeg, "decode_jpeg", missing)
    with pytest.raises(UserError, match=r"cannot decode: decode_jpegs_cuda: torchvision not compiled.*support$"):
        nvjpeg_name(torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_nvjpeg_name_contains_the_torchvision_version() -> None:
    name, version = nvjpeg_name(torch.device("cuda")).split(" ")
    assert name == "nvjpeg"
    assert version[0].isdigit()
