"""An image file -> a square uint8 array, by Pillow, and by torch where that stretches it sooner."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import time
import warnings
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

LETTERBOX_GRAY = 128
MAX_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: a quarter of a GiB of RGB
MAX_SECONDS = 10  # of computing for one image; waiting for a disk is not counted
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow would run Ghostscript for an EPS under any name
# One scan of a JPEG was measured to take 1.4 ns a pixel: so many of them are given to the decoder between two looks at
# the clock that the next look comes after a second or so.
_SCANS_TIMES_PIXELS = 700_000_000
SCAN = b"\xff\xda"  # how each begins; in its data 0xff is followed by 0
# Up to so many torch stretches an image: of 640 x 480 in a quarter of Pillow's time (AVX-512), of 4000 x 3000 in half
# of it at best; but it wants the pixels twice more, and of the largest images several may be in hand.
_STRETCHED_BY_TORCH = 1 << 22
_NO_NAME = re.compile("[\0\ud800-\udfff]")  # in a name that no file can have
_PIECE = 1 << 16  # what decoders ask for at once; the reads of a header are smaller

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit is checked below
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # on odd metadata, in the middle of a bar


class InvalidImageError(Exception):
    """An image that cannot be used; the message is the reason, in a few words."""


class WatchedFile(io.BufferedReader):
    """A file whose reader gets an error once it has computed for too long.

    The time that a JPEG takes has no limit in its size: thousands of its scans, each of a few bytes, may go over all
    of its pixels. A thread cannot be stopped from outside, but Pillow's decoders come back for more of the file.

    Attributes:
        scans: of a JPEG that are given at once.
    """

    def __init__(self, path: Path) -> None:
        # Without O_NONBLOCK a named pipe would be waited for before it can be looked at.
        super().__init__(io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)))
        self._begin = time.thread_time()
        self.scans: int | None = None
        if not stat.S_ISREG(os.fstat(self.fileno()).st_mode):
            self.close()
            raise InvalidImageError("not a regular file")

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and 0 <= size < _PIECE:
            return super().read(size)
        if time.thread_time() - self._begin > MAX_SECONDS:
            raise InvalidImageError(f"takes more than {MAX_SECONDS} s to decode")
        piece = super().read(size)
        if self.scans is not None and piece.count(SCAN) > self.scans:
            whole, end = len(piece), 0
            for _ in range(self.scans + 1):
                end = piece.index(SCAN, end) + len(SCAN)
            piece = piece[: end - len(SCAN)]
            self.seek(len(piece) - whole, os.SEEK_CUR)
        return piece


def image_path(folder: Path, name: str, follow_links: bool) -> Path:
    """Where an image of a folder is.

    Raises:
        InvalidImageError: its name leads out of the folder; or a link does, and that is not allowed.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise InvalidImageError("its name leads out of the image folder")
    if _NO_NAME.search(name):
        raise InvalidImageError("its name cannot be one of a file")
    path = folder / name
    if follow_links or not _has_link(folder, name):
        return path
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InvalidImageError("a link leads out of the image folder (--set data.follow_links=true allows it)")
    return path


def _has_link(folder: Path, name: str) -> bool:
    """Whether a name has a link on its way; much quicker than to find out where it leads."""
    place = str(folder)
    for part in name.split("/"):
        place = f"{place}/{part}"
        if os.path.islink(place):  # noqa: PTH114 (a Path takes longer than the question)
            return True
    return False


def load_image(path: Path, side: int, resize_mode: str) -> np.ndarray:
    """Decode an image and make it square. Resizing is bilinear and antialiased, as Pillow does it, to one level.

    Args:
        path: JPEG, PNG, WebP, BMP, TIFF or GIF.
        side: of the result, in pixels.
        resize_mode: "stretch" (the whole image, its aspect ratio changed: the habit of the Keras and TensorFlow
            line), "crop" (the center square) or "letterbox" (the whole image, gray bars).

    Returns:
        uint8 (side, side, 3), RGB.

    Raises:
        InvalidImageError: missing, empty, truncated, no image, too large, or takes too long.
    """
    picture = load_rgb(path)
    return _stretched(picture, side) if resize_mode == "stretch" else np.asarray(_square(picture, side, resize_mode))


def load_view(path: Path, side: int, resize_mode: str, longest: int) -> np.ndarray:
    """What `load_image` covers of an image, for showing: the whole image in its own proportions when it was
    stretched, else the square that was cut or padded.

    Args:
        path, side, resize_mode: as for `load_image`.
        longest: the result's longer side in pixels, at most.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        InvalidImageError: as for `load_image`.
    """
    picture = load_rgb(path)
    if resize_mode != "stretch":
        picture = _square(picture, side, resize_mode)
    picture.thumbnail((longest, longest))
    return np.asarray(picture)


def load_rgb(path: Path) -> Image.Image:
    """Decode an image: EXIF rotation applied, transparency over white, 16-bit gray scaled to 8 bits, the first
    frame of an animation.

    Raises:
        InvalidImageError: missing, empty, truncated, no image, too large, or takes too long.
    """
    try:
        with WatchedFile(path) as file, Image.open(file, formats=FORMATS) as image:
            pixels = image.width * image.height
            # libtiff decodes whole tiles, whatever the image takes of them.
            tile = (
                image.tag_v2.get(TILEWIDTH, 1) * image.tag_v2.get(TILELENGTH, 1)
                if isinstance(image, TiffImageFile)
                else 1
            )
            if max(pixels, tile) > MAX_PIXELS:
                raise InvalidImageError("too many pixels")
            file.scans = max(1, _SCANS_TIMES_PIXELS // max(1, pixels)) if image.format in ("JPEG", "MPO") else None
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (InvalidImageError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise InvalidImageError("missing") from error
    except IsADirectoryError as error:
        raise InvalidImageError("is a folder") from error
    except PermissionError as error:
        raise InvalidImageError("no permission to read") from error
    except Image.DecompressionBombError as error:
        raise InvalidImageError("too many pixels") from error
    except UnidentifiedImageError as error:
        raise InvalidImageError("empty file" if path.stat().st_size == 0 else "not an image") from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that nothing drives
            raise InvalidImageError("not a regular file") from error
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP):
            raise InvalidImageError(os.strerror(error.errno).lower()) from error
        if error.errno is not None:  # the machine's trouble, not the image's: a network folder that is gone
            raise
        raise InvalidImageError(_reason(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise InvalidImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if "truncated" in str(error).lower():
        return "truncated"
    return f"unreadable ({type(error).__name__}: {error})"[:200]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _stretched(image: Image.Image, side: int) -> np.ndarray:
    import torch  # here, since commands that touch no image do without it
    from torch.nn.functional import interpolate

    quick = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # what its quick loops are written in
    if not quick or image.width * image.height > _STRETCHED_BY_TORCH:
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
    square: np.ndarray = interpolate(pixels, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return square


def _square(image: Image.Image, side: int, resize_mode: str) -> Image.Image:
    """The center square, or the whole image between gray bars."""
    if resize_mode == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    whole = Image.new("RGB", (side, side), (LETTERBOX_GRAY,) * 3)
    fitted = image.resize((width, height), Image.Resampling.BILINEAR)
    whole.paste(fitted, ((side - width) // 2, (side - height) // 2))
    return whole


def decoder_name() -> str:
    """The decoding library, for the provenance."""
    return f"pillow {PIL.__version__}"
