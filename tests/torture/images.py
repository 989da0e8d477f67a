"""Corrupted images of every format: each is decoded, or marked invalid with a reason."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  # registers JPEG XL
from PIL import Image

from gridcap.common.image import InvalidImageError, load_image
from gridcap.common.scenes import all_scenes, render
from tests.torture.case import Part, require

MAX_SECONDS = 10
MAX_MIB = 3 << 10
SIDE = 299
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> mode, suffix, options of Image.save
    "baseline": ("RGB", "jpg", {"quality": 80}),
    "progressive": ("RGB", "jpg", {"progressive": True}),
    "gray": ("L", "jpg", {}),
    "cmyk": ("CMYK", "jpg", {}),
    "truecolor": ("RGB", "png", {}),
    "alpha": ("RGBA", "png", {}),
    "palette": ("P", "png", {}),
    "16-bit": ("I;16", "png", {}),
    "lossy": ("RGB", "webp", {"quality": 70}),
    "lossless": ("RGBA", "webp", {"lossless": True}),
    "animated": ("RGB", "webp", {"save_all": True}),
    "raw": ("RGB", "tif", {}),
    "lzw": ("RGB", "tif", {"compression": "tiff_lzw"}),
    "deflate": ("L", "tif", {"compression": "tiff_adobe_deflate"}),
    "jpeg": ("RGB", "tif", {"compression": "jpeg"}),
    "bitmap": ("RGB", "bmp", {}),
    "still": ("P", "gif", {}),
    "moving": ("P", "gif", {"save_all": True}),
    "stereo": ("RGB", "mpo", {"save_all": True}),
    "phone": ("RGB", "heic", {}),
    "av1": ("RGB", "avif", {}),
    "xl": ("RGB", "jxl", {}),
    "xl-container": ("RGBA", "jxl", {"lossless": True, "use_container": True}),
}


def _prepare(folder: Path) -> None:
    pillow_heif.register_heif_opener()
    for i, (name, (mode, suffix, options)) in enumerate(_KINDS.items()):
        pictures = [render(all_scenes()[7 * i + k], np.random.default_rng(i), 72).resize((72, 56)) for k in range(2)]
        frames = [_in_mode(picture, mode) for picture in pictures]
        more: dict[str, Any] = {"append_images": frames[1:]} if options.get("save_all") else {}
        frames[0].save(folder / f"{name}.{suffix}", **options, **more)


def _in_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257)
    return picture.convert(mode)


def _run(folder: Path, rng: np.random.Generator) -> str:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("case"))
    file = files[int(rng.integers(len(files)))]
    other = files[int(rng.integers(len(files)))].read_bytes()
    path = folder / f"case{file.suffix}"
    path.write_bytes(mutate_bytes(file.read_bytes(), other, rng))
    resize_mode = ("stretch", "crop", "letterbox")[int(rng.integers(3))]
    start, before = time.monotonic(), _reset_peak_memory()
    try:
        grid = load_image(path, SIDE, resize_mode)
        require(grid.shape == (SIDE, SIDE, 3) and grid.dtype == np.uint8, f"{file.name} became {grid.shape}")
        outcome = "decoded"
    except InvalidImageError as error:
        require(bool(str(error)) and "\n" not in str(error), f"{file.name}: invalid without a one-line reason")
        outcome = "invalid with a reason"
    seconds, peak = time.monotonic() - start, _mib("VmHWM") - before
    require(seconds < MAX_SECONDS, f"{file.name} took {seconds:.0f} s")
    require(peak < MAX_MIB, f"{file.name} needed {peak} MiB")
    return outcome


def _reset_peak_memory() -> int:
    """Reset the peak memory of this process and return its current memory in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _mib("VmRSS")


def _mib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10


def mutate_bytes(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Apply one to eight mutations: flipped bits, changed numbers, and removed, duplicated, or replaced pieces."""
    changed = bytearray(content)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 8]))):
        if len(changed) < 16:
            break
        # Half of the mutations are in the header, which contains sizes and lengths.
        position = int(rng.integers(min(len(changed), 128) if rng.random() < 0.5 else len(changed)))
        length = int(rng.integers(1, 65))
        kind = int(rng.integers(8))
        if kind == 0:
            changed[position] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[position] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        elif kind == 2:
            number = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF]))
            changed[position : position + 4] = struct.pack(">I" if rng.random() < 0.5 else "<I", number)
        elif kind == 3:
            del changed[position : position + length]
        elif kind == 4:
            changed[position:position] = changed[position : position + length]
        elif kind == 5:
            changed[position : position + length] = rng.bytes(length)
        elif kind == 6:
            start = int(rng.integers(len(other)))
            changed[position : position + length] = other[start : start + length]
        else:
            del changed[max(16, position) :]
    return io.BytesIO(bytes(changed)).getvalue()


PART = Part("corrupted JPEG, PNG, WebP, TIFF, GIF, BMP, MPO, HEIC, AVIF, or JPEG XL", 20_000, 300, _prepare, _run)
