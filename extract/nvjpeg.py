"""JPEG files -> square uint8 arrays on a GPU, by nvJPEG through torchvision.

nvJPEG gets the common case, whole gray or colour JPEG files; whatever else a folder holds goes through Pillow,
which also judges what is damaged, so that an image is refused for the same reason with either decoder. The
pixels are not Pillow's to the last digit: nvJPEG interpolates colour (chroma) in its own way, and the resizing
is torch's. Hence the decoder stands in the provenance.

Not run on a GPU yet. torchvision decodes on the CPU through the same call, and the tests do that.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from common.errors import UserError, first_line
from common.image import LETTERBOX_GREY, MAX_PIXELS, SCAN, BadImageError, WatchedFile, load_square

_PIXELS_AT_ONCE = 2 * MAX_PIXELS  # decoded together: half a GiB of GPU memory
_ORIENTATION = 0x0112
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
    paths: Sequence[Path], side: int, geometry: str, device: torch.device
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode a batch of images and make them square, as `common.image.load_square` does with each.

    Args:
        paths: JPEG files, or what `load_square` takes.
        side: of the results, in pixels.
        geometry: "stretch", "crop" or "letterbox".
        device: where to decode and resize.

    Returns:
        uint8 (B, side, side, 3), RGB; and position -> reason of those that cannot be used, which are all zero.
    """
    squares = np.zeros((len(paths), side, side, 3), np.uint8)
    rejects: dict[int, str] = {}
    group: dict[int, _Jpeg] = {}
    pixels = 0

    def by_pillow(position: int) -> None:
        try:
            squares[position] = load_square(paths[position], side, geometry)
        except BadImageError as error:
            rejects[position] = str(error)

    def decode_group() -> None:
        done: dict[int, Tensor] = {}
        for position, image in zip(group, _decode(list(group.values()), device), strict=True):
            if image is None:
                by_pillow(position)
            else:
                done[position] = _square(_upright(image, group[position].orientation), side, geometry)
        if done:
            squares[list(done)] = torch.stack(list(done.values())).permute(0, 2, 3, 1).cpu().numpy()
        group.clear()

    for position, path in enumerate(paths):
        jpeg = _read_plain(path)
        if jpeg is None:
            by_pillow(position)
            continue
        if pixels + jpeg.pixels > _PIXELS_AT_ONCE:
            decode_group()
            pixels = 0
        group[position] = jpeg
        pixels += jpeg.pixels
    decode_group()
    return squares, rejects


class _Jpeg:
    """A whole gray or colour JPEG file, not decoded."""

    def __init__(self, data: bytes, pixels: int, orientation: int) -> None:
        self.data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.pixels = pixels
        self.orientation = orientation


def _read_plain(path: Path) -> _Jpeg | None:
    """A file for nvJPEG, or None if it is one for Pillow: of another kind, damaged, not readable, too large.

    A file that does not end as a JPEG does may be truncated, of which nvJPEG need not complain; one of very many scans
    may take minutes, and here nothing would cut it off.
    """
    try:
        with WatchedFile(path) as file, Image.open(file, formats=("JPEG",)) as image:  # reads the header alone
            pixels = image.width * image.height
            plain = image.format == "JPEG" and image.mode in ("L", "RGB") and pixels <= MAX_PIXELS
            if not plain or image.info.get("adobe_transform") == 0:  # 0: RGB is stored, not YCbCr
                return None
            orientation = image.getexif().get(_ORIENTATION, 1)
            file.seek(0)
            data = file.read()
    except Exception:  # Pillow will meet it again, and say why
        return None
    whole = data.endswith(_END_OF_IMAGE) and data.count(SCAN) <= _MOST_SCANS
    return _Jpeg(data, pixels, orientation) if whole else None


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
    except RuntimeError:
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


def _square(image: Tensor, side: int, geometry: str) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, side, side), as `common.image` does with Pillow."""
    height, width = image.shape[1:]
    if geometry == "crop":
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        return _resize(image[:, top : top + short, left : left + short], side, side)
    if geometry == "letterbox":
        scale = side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        whole = torch.full((3, side, side), LETTERBOX_GREY, dtype=torch.uint8, device=image.device)
        top, left = (side - height) // 2, (side - width) // 2
        whole[:, top : top + height, left : left + width] = _resize(image, height, width)
        return whole
    return _resize(image, side, side)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing. In float32: torch resizes bytes on the CPU alone."""
    resized = functional.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)
