"""JPEG files -> square uint8 images on a GPU, by nvJPEG through torchvision.

nvJPEG gets the common case, whole gray or color JPEG files (`jpeg.py`); whatever else a folder holds goes through
Pillow, which also judges what is damaged, so that an image is refused for the same reason with either decoder. The
pixels are not Pillow's to the last digit: nvJPEG interpolates color (chroma) in its own way, and all geometries are
resized by torch, in float32. Hence the decoder stands in the provenance.

torchvision decodes on the CPU through the same call, and the tests do that where there is no GPU.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from gridcap.common.errors import UserError, first_line
from gridcap.common.image import LETTERBOX_GRAY, MAX_PIXELS, InvalidImageError, load_image
from gridcap.extract.images.jpeg import Jpeg, read_supported_jpeg

_PIXELS_AT_ONCE = 2 * MAX_PIXELS  # decoded together: half a GiB of GPU memory
_RESIZED_AT_ONCE = 32  # of one size: in float32 they take four times the room
_NO_ROOM = "ALLOCATOR_FAILURE"


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


def load_images_gpu(
    paths: Sequence[Path | None], side: int, resize_mode: str, device: torch.device
) -> tuple[Tensor, dict[int, str]]:
    """Decode a batch of images and make them square, as `common.image.load_image` does with each.

    Any thread may call it; on a GPU it works beside what other threads have there.

    Args:
        paths: JPEG files, or what `load_image` takes; None for an image that is not to be read.
        side: of the results, in pixels.
        resize_mode: "stretch", "crop" or "letterbox".
        device: where to decode and resize.

    Returns:
        uint8 (B, side, side, 3), RGB, on the device; and position -> reason of those that cannot be used, which are
        all zero, as are those that are not read.
    """
    rejects: dict[int, str] = {}
    group: dict[int, Jpeg] = {}
    pixels = 0
    with _beside_others(device):
        squares = torch.zeros((len(paths), side, side, 3), dtype=torch.uint8, device=device)

        def by_pillow(position: int, path: Path) -> None:
            try:
                squares[position] = torch.from_numpy(load_image(path, side, resize_mode).copy())
            except InvalidImageError as error:
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
                    made = _square(torch.stack(whole[some]), side, resize_mode)
                    squares.index_copy_(0, positions[some], made.permute(0, 2, 3, 1))
            if device.type == "cuda":  # the next group's images, written on a stream of nvJPEG's, may take their place
                torch.cuda.current_stream(device).synchronize()
            group.clear()

        for position, path in enumerate(paths):
            if path is None:
                continue
            jpeg = read_supported_jpeg(path)
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


def _decode(jpegs: list[Jpeg], device: torch.device) -> list[Tensor | None]:
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


def _square(images: Tensor, side: int, resize_mode: str) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, side, side), as `common.image` does it."""
    height, width = images.shape[2:]
    if resize_mode == "crop":
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        return _resize(images[:, :, top : top + short, left : left + short], side, side)
    if resize_mode == "letterbox":
        scale = side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        whole = images.new_full((len(images), 3, side, side), LETTERBOX_GRAY)
        top, left = (side - height) // 2, (side - width) // 2
        whole[:, :, top : top + height, left : left + width] = _resize(images, height, width)
        return whole
    return _resize(images, side, side)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing. In float32: torch resizes bytes on the CPU alone."""
    resized = functional.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
