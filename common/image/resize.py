"""Resizing of an image to a square."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from gridcap.common.image.decode import load_rgb
from gridcap.common.image.views import SelectedView
from gridcap.common.sources.registry import ImageFile

LETTERBOX_GRAY = 128
MIN_OVERSAMPLING = 2  # scaled JPEG decoding keeps at least this many pixels per pixel of the square, per axis
# Up to this many pixels, torch resizes faster than Pillow: 4x at 640 x 480 (AVX-512), 2x at best at 4000 x 3000. It
# needs two more copies of the pixels, and several of the largest images may be in memory at once.
MAX_TORCH_PIXELS = 1 << 22


def load_image(path: ImageFile, side: int, resize_mode: str, scaled_decoding: bool = True) -> np.ndarray:
    """Decode an image and resize it to a square.

    Resizing is bilinear with antialiasing, equal to Pillow's to one gray level (two for a few pixels of noise).

    Args:
        path: image file, see `load_rgb`.
        side: side of the square in pixels.
        resize_mode: "stretch" (the whole image without its aspect ratio, as Keras and TensorFlow do), "crop" (center
            crop), "letterbox" (the whole image with gray bars), or "timm:INTERPOLATION:CROP" (timm's evaluation
            transform: the center of an image whose shorter side is `side` / CROP, for example "timm:bicubic:0.875").
        scaled_decoding: whether libjpeg may reduce a large JPEG file while it decodes it, to no less than twice `side`.
            It takes less than half of the time for a photo of 12 megapixels, and pixel values may differ slightly.

    Returns:
        uint8 (side, side, 3), RGB.

    Raises:
        InvalidImageError, OSError: as for `load_rgb`.
    """
    return make_square(load_rgb(path, min_decoded_side(side) if scaled_decoding else None), side, resize_mode)


def load_views(
    path: ImageFile, side: int, resize_mode: str, scaled_decoding: bool, views: Sequence[SelectedView], file_name: str
) -> np.ndarray:
    """Decode an image once and resize it and its views to squares.

    Args:
        path, side, resize_mode, scaled_decoding: as for `load_image`.
        views: V views that are functions of the image.
        file_name: name of the image, which determines random views.

    Returns:
        uint8 (1 + V, side, side, 3), RGB; the original first.

    Raises:
        InvalidImageError, OSError: as for `load_rgb`.
    """
    image = load_rgb(path, min_decoded_side(side, views) if scaled_decoding else None)
    return make_views(image, side, resize_mode, views, file_name)


def load_view(path: ImageFile, side: int, resize_mode: str, max_side: int) -> np.ndarray:
    """Decode what `load_image` covers of an image, for display.

    A stretched image keeps its aspect ratio here; otherwise the cropped or padded square is returned.

    Args:
        path, side, resize_mode: as for `load_image`.
        max_side: maximum length of the longer side in pixels.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        InvalidImageError, OSError: as for `load_rgb`.
    """
    image = load_rgb(path, MIN_OVERSAMPLING * max(side, max_side))
    if resize_mode != "stretch":
        image = _crop_or_pad(image, side, resize_mode)
    image.thumbnail((max_side, max_side))
    return np.asarray(image)


def make_square(image: Image.Image | np.ndarray, side: int, resize_mode: str) -> np.ndarray:
    """Make a decoded image square, as `load_image` does.

    Args:
        image: an RGB image, or its pixels, uint8 (H, W, 3).
        side, resize_mode: as for `load_image`.
    """
    if resize_mode == "stretch":
        return stretch(image, side)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(_crop_or_pad(image, side, resize_mode))


def make_views(
    image: Image.Image, side: int, resize_mode: str, views: Sequence[SelectedView], file_name: str
) -> np.ndarray:
    """Make a decoded image and its views square, as `load_views` does."""
    images = [image, *(view.apply(image, file_name) for view in views)]
    return np.stack([make_square(view, side, resize_mode) for view in images])


def min_decoded_side(side: int, views: Sequence[SelectedView] = ()) -> int:
    """Return the side in pixels to which scaled decoding may reduce an image that is resized to `side`."""
    return math.ceil(MIN_OVERSAMPLING * side / min((view.min_share for view in views), default=1))


def stretch(image: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """Resize an RGB image, or its pixels, to uint8 (side, side, 3), ignoring its aspect ratio."""
    import torch  # only here: commands that do not decode images start without it
    from torch.nn.functional import interpolate

    vectorized = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    if not vectorized or width * height > MAX_TORCH_PIXELS:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    array = image if isinstance(image, np.ndarray) else np.array(image)
    pixels = torch.from_numpy(array)[None].permute(0, 3, 1, 2)
    square: np.ndarray = interpolate(pixels, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return square


def _crop_or_pad(image: Image.Image, side: int, resize_mode: str) -> Image.Image:
    """Return the center square, or the whole image between gray bars."""
    if resize_mode.startswith("timm:"):
        return _crop_like_timm(image, side, resize_mode)
    if resize_mode == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side), (LETTERBOX_GRAY,) * 3)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square


def _crop_like_timm(image: Image.Image, side: int, resize_mode: str) -> Image.Image:
    """Resize the shorter side and cut out the center, as `timm.data.transforms_factory.transforms_imagenet_eval`."""
    _, interpolation, crop = resize_mode.split(":")
    short = math.floor(side / float(crop))
    width, height = image.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    resized = image.resize(size, Image.Resampling[interpolation.upper()])
    left, top = (round((length - side) / 2) for length in size)
    return resized.crop((left, top, left + side, top + side))
