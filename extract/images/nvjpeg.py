"""JPEG decoding on a GPU: files -> square uint8 images, with nvJPEG through torchvision.

nvJPEG decodes complete grayscale and color JPEG files (see `jpeg.py`). All other files go through Pillow, which also
decides which files are invalid, so both decoders give the same reasons. Pixel values may differ slightly from
Pillow's: nvJPEG upsamples chroma differently, and torch resizes in float32. The decoder is therefore part of the
provenance.

torchvision decodes on the CPU through the same call; tests on machines without a GPU use it.
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

MAX_DECODED_PIXELS = 2 * MAX_PIXELS  # decoded in one call: half a GiB of GPU memory
MAX_RESIZED_IMAGES = 32  # of one size, resized in one call: float32 takes four times the memory of uint8
_ALLOCATION_FAILURE = "ALLOCATOR_FAILURE"
_streams = threading.local()


def nvjpeg_name(device: torch.device) -> str:
    """Return the name of the decoding library for the provenance.

    Raises:
        UserError: the device is not a GPU, or torchvision was built without nvJPEG.
    """
    if device.type != "cuda":
        raise UserError(
            f"--jpeg-decoder nvjpeg: needs an NVIDIA GPU, but the device is {device}", "pass --jpeg-decoder pillow"
        )
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "jpeg")
    try:
        decode_jpeg([torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)], ImageReadMode.RGB, device)
    except RuntimeError as error:  # without this check every image would silently go through Pillow
        raise UserError(
            f"--jpeg-decoder nvjpeg: torchvision {torchvision.__version__} cannot decode: {first_line(error)}",
            "pass --jpeg-decoder pillow, or install a torchvision built with nvJPEG",
        ) from error
    return f"nvjpeg {torchvision.__version__}"


def load_images_gpu(
    paths: Sequence[Path | None], side: int, resize_mode: str, device: torch.device
) -> tuple[Tensor, dict[int, str]]:
    """Decode a batch of images and make them square, as `common.image.load_image` does for one image.

    Thread-safe; on a GPU each thread uses a stream of its own.

    Args:
        paths: image files; None for images to skip.
        side: side of the results, in pixels.
        resize_mode: "stretch", "crop", or "letterbox".
        device: where to decode and resize.

    Returns:
        uint8 (B, side, side, 3), RGB, on the device; and position -> reason of the invalid images. Invalid and
        skipped images are all zero.
    """
    with _thread_stream(device):
        batch = _Batch(len(paths), side, resize_mode, device)
        for position, path in enumerate(paths):
            if path is not None:
                batch.add(position, path)
        batch.decode_pending()
    return batch.squares, batch.invalid


class _Batch:
    """The square images of a batch, and the JPEG files waiting to be decoded in one call."""

    def __init__(self, count: int, side: int, resize_mode: str, device: torch.device) -> None:
        self.squares = torch.zeros((count, side, side, 3), dtype=torch.uint8, device=device)
        self.invalid: dict[int, str] = {}
        self._side = side
        self._resize_mode = resize_mode
        self._device = device
        self._pending: dict[int, Jpeg] = {}
        self._pending_pixels = 0

    def add(self, position: int, path: Path) -> None:
        """Queue a file for nvJPEG, or decode it with Pillow."""
        jpeg = read_supported_jpeg(path)
        if jpeg is None:
            self._decode_with_pillow(position, path)
            return
        if self._pending_pixels + jpeg.pixels > MAX_DECODED_PIXELS:
            self.decode_pending()
        self._pending[position] = jpeg
        self._pending_pixels += jpeg.pixels

    def decode_pending(self) -> None:
        """Decode the queued files in one call."""
        by_shape: dict[torch.Size, dict[int, Tensor]] = {}
        for (position, jpeg), image in zip(
            self._pending.items(), _decode(list(self._pending.values()), self._device), strict=True
        ):
            if image is None:
                self._decode_with_pillow(position, jpeg.path)
            else:
                upright = _apply_orientation(image, jpeg.orientation)
                by_shape.setdefault(upright.shape, {})[position] = upright
        for images in by_shape.values():  # data sets have few distinct sizes, and each call has a fixed cost
            self._resize(images)
        if self._device.type == "cuda":  # nvJPEG writes the next images on its own stream, into the memory freed here
            torch.cuda.current_stream(self._device).synchronize()
        self._pending.clear()
        self._pending_pixels = 0

    def _resize(self, images: dict[int, Tensor]) -> None:
        """Make images of one size square."""
        positions = torch.tensor(list(images), device=self._device)
        tensors = list(images.values())
        for start in range(0, len(tensors), MAX_RESIZED_IMAGES):
            chunk = slice(start, start + MAX_RESIZED_IMAGES)
            squares = _make_square(torch.stack(tensors[chunk]), self._side, self._resize_mode)
            self.squares.index_copy_(0, positions[chunk], squares.permute(0, 2, 3, 1))

    def _decode_with_pillow(self, position: int, path: Path) -> None:
        try:
            square = load_image(path, self._side, self._resize_mode, scaled_decoding=False)
            self.squares[position] = torch.from_numpy(square.copy())
        except InvalidImageError as error:
            self.invalid[position] = str(error)


@contextlib.contextmanager
def _thread_stream(device: torch.device) -> Iterator[None]:
    """Run the block on this thread's own CUDA stream and wait for it.

    One stream per thread instead of per batch, because torch reuses freed memory only on the same stream.
    """
    if device.type != "cuda":
        yield
        return
    stream = getattr(_streams, "stream", None)
    if stream is None or stream.device != device:
        _streams.stream = stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _decode(jpegs: list[Jpeg], device: torch.device) -> list[Tensor | None]:
    """Decode files to uint8 (3, H, W); None for a file that torchvision cannot decode.

    torchvision fails for a whole list if one of its files is invalid; the files are then decoded one by one.
    """
    if not jpegs:
        return []
    try:
        images: list[Tensor | None] = decode_jpeg([jpeg.data for jpeg in jpegs], ImageReadMode.RGB, device)
        return images
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _ALLOCATION_FAILURE in str(error):  # nvJPEG's own allocation failed; the files are not invalid
            raise torch.OutOfMemoryError(f"nvJPEG: {first_line(error)}") from error
        if len(jpegs) == 1:
            return [None]
    return [_decode([jpeg], device)[0] for jpeg in jpegs]


def _apply_orientation(image: Tensor, orientation: int) -> Tensor:
    """Rotate and flip (3, H, W) upright, given its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        image = image.flip(1)
    if orientation in (2, 3, 6, 7):
        image = image.flip(2)
    return image


def _make_square(images: Tensor, side: int, resize_mode: str) -> Tensor:
    """Resize uint8 (B, 3, H, W) to uint8 (B, 3, side, side), as `common.image` does."""
    height, width = images.shape[2:]
    if resize_mode == "crop":
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        return _resize(images[:, :, top : top + short, left : left + short], side, side)
    if resize_mode == "letterbox":
        scale = side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        squares = images.new_full((len(images), 3, side, side), LETTERBOX_GRAY)
        top, left = (side - height) // 2, (side - width) // 2
        squares[:, :, top : top + height, left : left + width] = _resize(images, height, width)
        return squares
    return _resize(images, side, side)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly with antialiasing, in float32 because torch resizes uint8 on the CPU only."""
    resized = functional.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
