"""JPEG files -> square uint8 images on a GPU, by nvJPEG through torchvision.

nvJPEG gets the common case, whole gray or colour JPEG files; whatever else a folder holds goes through Pillow,
which also judges what is damaged, so that an image is refused for the same reason with either decoder. The
pixels are not Pillow's to the last digit: nvJPEG interpolates colour (chroma) in its own way, and the resizing
is torch's. Hence the decoder stands in the provenance.

torchvision decodes on the CPU through the same call, and the tests do that where there is no GPU.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from common.errors import UserError, first_line
from common.image import LETTERBOX_GREY, MAX_PIXELS, SCAN, BadImageError, WatchedFile, load_square

_PIXELS_AT_ONCE = 2 * MAX_PIXELS  # decoded together: half a GiB of GPU memory
_RESIZED_AT_ONCE = 32  # of one size: in float32 they take four times the room
_LARGEST_FILE = 3 * MAX_PIXELS  # bytes; Pillow need not read a larger one as a whole
_ORIENTATION = 0x0112
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, with Huffman codes
# Of other frames (lossless, arithmetic codes, ...), and those that nothing belongs to: not before the first scan.
_NOT_HERE = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xDA)}
_NO_ROOM = "ALLOCATOR_FAILURE"
_MOST_SCANS = 100  # progressive files have about ten
_END_OF_IMAGE = b"\xff\xd9"


def nvjpeg_name(device: torch.device) -> str:
    """The decoding library, for the provenance.

    Raises:
        UserError: no GPU, or a torchvision without nvJPEG.
    """
    if device.type != "cuda":
        raise UserError(f"--decoder nvjpeg: needs an NVIDIA GPU, and the device is {device}", "use --decoder pillow")
    try:
        _probe(device)
    except RuntimeError as error:  # or every image would go through Pillow, and nobody would know
        raise UserError(
            f"--decoder nvjpeg: torchvision {torchvision.__version__} cannot: {first_line(error)}",
            "use --decoder pillow, or a torchvision built with nvJPEG",
        ) from error
    return f"nvjpeg {torchvision.__version__}"


def _probe(device: torch.device) -> None:
    """Decode a small JPEG file, or raise what torchvision raises."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "jpeg")
    decode_jpeg([torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)], ImageReadMode.RGB, device)


def load_squares(
    paths: Sequence[Path | None], side: int, geometry: str, device: torch.device
) -> tuple[Tensor, dict[int, str]]:
    """Decode a batch of images and make them square, as `common.image.load_square` does with each.

    Any thread may call it; on a GPU it works beside what other threads have there.

    Args:
        paths: JPEG files, or what `load_square` takes; None for an image that is not to be read.
        side: of the results, in pixels.
        geometry: "stretch", "crop" or "letterbox".
        device: where to decode and resize.

    Returns:
        uint8 (B, side, side, 3), RGB, on the device; and position -> reason of those that cannot be used, which are
        all zero, as are those that are not read.
    """
    rejects: dict[int, str] = {}
    group: dict[int, _Jpeg] = {}
    pixels = 0
    with _beside_others(device):
        squares = torch.zeros((len(paths), side, side, 3), dtype=torch.uint8, device=device)

        def by_pillow(position: int, path: Path) -> None:
            try:
                squares[position] = torch.from_numpy(load_square(path, side, geometry).copy())
            except BadImageError as error:
                rejects[position] = str(error)

        def decode_group() -> None:
            by_shape: dict[torch.Size, dict[int, Tensor]] = {}
            for position, image in zip(group, _decode(list(group.values()), device), strict=True):
                if image is None:
                    by_pillow(position, group[position].path)
                else:
                    upright = _upright(image, group[position].orientation)
                    by_shape.setdefault(upright.shape, {})[position] = upright
            for alike in by_shape.values():  # a photographer's pictures have few sizes, and a call has its price
                positions = torch.tensor(list(alike), device=device)
                whole = list(alike.values())
                for start in range(0, len(whole), _RESIZED_AT_ONCE):
                    some = slice(start, start + _RESIZED_AT_ONCE)
                    made = _square(torch.stack(whole[some]), side, geometry)
                    squares.index_copy_(0, positions[some], made.permute(0, 2, 3, 1))
            if device.type == "cuda":  # the next group's images, written on a stream of nvJPEG's, may take their place
                torch.cuda.current_stream(device).synchronize()
            group.clear()

        for position, path in enumerate(paths):
            if path is None:
                continue
            jpeg = _read_plain(path)
            if jpeg is None:
                by_pillow(position, path)
                continue
            if pixels + jpeg.pixels > _PIXELS_AT_ONCE:
                decode_group()
                pixels = 0
            group[position] = jpeg
            pixels += jpeg.pixels
        decode_group()
    return squares, rejects


@contextlib.contextmanager
def _beside_others(device: torch.device) -> Iterator[None]:
    """Have the GPU do the block's work on this thread's own stream, and wait for its end.

    One a thread, and not one a batch: torch keeps what a stream has freed for that stream alone.
    """
    if device.type != "cuda":
        yield
        return
    stream = getattr(_of_thread, "stream", None)
    if stream is None or stream.device != device:
        _of_thread.stream = stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


_of_thread = threading.local()


class _Jpeg:
    """A whole gray or colour JPEG file, not decoded."""

    def __init__(self, path: Path, data: bytearray, pixels: int, orientation: int) -> None:
        self.path = path
        self.data = torch.frombuffer(data, dtype=torch.uint8)
        self.pixels = pixels
        self.orientation = orientation


def _read_plain(path: Path) -> _Jpeg | None:
    """A file for nvJPEG, or None if it is one for Pillow: of another kind, damaged, not readable, too large.

    A file that does not end as a JPEG does may be truncated, of which nvJPEG need not complain; one of very many scans
    may take minutes, and here nothing would cut it off.
    """
    try:
        data = _read_whole(path)
        pixels, orientation = _look_at_header(data)
    except Exception:  # Pillow will meet it again, and say why
        return None
    whole = data.endswith(_END_OF_IMAGE) and data.count(SCAN) <= _MOST_SCANS
    return _Jpeg(path, data, pixels, orientation) if whole else None


def _read_whole(path: Path) -> bytearray:
    """A file's bytes; BadImageError or ValueError if it is no regular file, or a very large one."""
    with WatchedFile(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_FILE:
            raise ValueError("not for nvJPEG")
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ValueError("it became shorter")
        return data


def _look_at_header(data: bytearray) -> tuple[int, int]:
    """Pixels and EXIF orientation of a JPEG file (ITU-T T.81, annex B.2).

    Pillow would tell too, in a tenth of a millisecond, which for thousands of files a second is too much.

    Raises:
        ValueError, IndexError: it is no JPEG file, or none that nvJPEG decodes as Pillow does.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG file")
    at, pixels, orientation, exif = 2, 0, 1, None
    while True:
        if data[at] != 0xFF:
            raise ValueError("no marker")
        kind = data[at + 1]
        if kind == 0xFF:  # to fill up
            at += 1
            continue
        body, end = at + 4, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xDA:
            break
        if kind < 0xC0 or kind in _NOT_HERE or end < body or (kind in _FRAMES and pixels):
            raise ValueError("not for nvJPEG")
        if kind in _FRAMES:
            pixels = int.from_bytes(data[body + 1 : body + 3], "big") * int.from_bytes(data[body + 3 : body + 5], "big")
            components = bytes(data[body + 6 : end : 3])  # their names
            if data[body] != 8 or data[body + 5] != len(components) or components == b"RGB":
                raise ValueError("not 8 bits, or RGB is stored")
            if len(components) not in (1, 3):
                raise ValueError("neither gray nor colour")
        elif kind == 0xE1 and data.startswith(b"Exif\0\0", body):
            if exif is not None:
                raise ValueError("EXIF in several pieces, which Pillow joins")
            exif = Image.Exif()
            exif.load(bytes(data[body:end]))
            orientation = exif.get(_ORIENTATION, 1)
        elif kind == 0xEE and data.startswith(b"Adobe", body) and data[body + 11] == 0:
            raise ValueError("RGB is stored, not YCbCr")
        elif (kind == 0xE2 and data.startswith(b"MPF\0", body)) or (
            kind == 0xE1 and data.find(b"Orientation", body, end) >= 0
        ):
            raise ValueError("several pictures, or an orientation in XMP")
        at = end
    if not 0 < pixels <= MAX_PIXELS:
        raise ValueError("no size, or too large")
    return pixels, orientation


def _decode(jpegs: list[_Jpeg], device: torch.device) -> list[Tensor | None]:
    """uint8 (3, H, W) each; None for a file that torchvision refuses.

    It fails for a whole list when one of its files is bad: then they are decoded one by one.
    """
    if not jpegs:
        return []
    try:
        images: list[Tensor | None] = decode_jpeg([j.data for j in jpegs], ImageReadMode.RGB, device)
        return images
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _NO_ROOM in str(error):  # nvJPEG's own, which torch's cache may have taken; no file is bad for it
            raise torch.OutOfMemoryError(f"nvJPEG: {first_line(error)}") from error
        if len(jpegs) == 1:
            return [None]
    return [_decode([jpeg], device)[0] for jpeg in jpegs]


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation, of (3, H, W)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    if orientation in (3, 4, 7, 8):  # rows from the bottom
        image = image.flip(1)
    if orientation in (2, 3, 6, 7):  # columns from the right
        image = image.flip(2)
    return image


def _square(images: Tensor, side: int, geometry: str) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, side, side), as `common.image` does with Pillow."""
    height, width = images.shape[2:]
    if geometry == "crop":
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        return _resize(images[:, :, top : top + short, left : left + short], side, side)
    if geometry == "letterbox":
        scale = side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        whole = images.new_full((len(images), 3, side, side), LETTERBOX_GREY)
        top, left = (side - height) // 2, (side - width) // 2
        whole[:, :, top : top + height, left : left + width] = _resize(images, height, width)
        return whole
    return _resize(images, side, side)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing. In float32: torch resizes bytes on the CPU alone."""
    resized = functional.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
