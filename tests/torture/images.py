"""Broken images of every format: each ends as a good row or as a reject with a reason."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gridcap.common.image import InvalidImageError, load_image
from gridcap.common.scenes import all_scenes, render
from tests.torture.case import Part, require

_SECONDS = 10
_MOST_MIB = 3 << 10
_SIDE = 299
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> mode, suffix, options of Pillow
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
}


def _prepare(folder: Path) -> None:
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
    path.write_bytes(mutated(file.read_bytes(), other, rng))
    resize_mode = ("stretch", "crop", "letterbox")[int(rng.integers(3))]
    begin, before = time.monotonic(), _forget_peak()
    try:
        grid = load_image(path, _SIDE, resize_mode)
        require(grid.shape == (_SIDE, _SIDE, 3) and grid.dtype == np.uint8, f"{file.name} became {grid.shape}")
        outcome = "a row"
    except InvalidImageError as error:
        require(bool(str(error)) and "\n" not in str(error), f"{file.name}: rejected without a reason in a line")
        outcome = "a reject with its reason"
    took, most = time.monotonic() - begin, _mib("VmHWM") - before
    require(took < _SECONDS, f"{file.name} took {took:.0f} s")
    require(most < _MOST_MIB, f"{file.name} took {most} MiB")
    return outcome


def _forget_peak() -> int:
    """Have Linux count this process's peak anew, and tell its memory now in MiB: what ran in it before has no say."""
    Path("/proc/self/clear_refs").write_text("5")
    return _mib("VmRSS")


def _mib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10


def mutated(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to eight changes: bits, bytes, numbers, pieces removed, doubled, exchanged, or taken from another file."""
    changed = bytearray(content)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 8]))):
        if len(changed) < 16:
            break
        # Headers are where lengths and sizes stand: half of the changes go there.
        place = int(rng.integers(min(len(changed), 128) if rng.random() < 0.5 else len(changed)))
        length = int(rng.integers(1, 65))
        kind = int(rng.integers(8))
        if kind == 0:
            changed[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        elif kind == 2:
            number = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF]))
            changed[place : place + 4] = struct.pack(">I" if rng.random() < 0.5 else "<I", number)
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length]
        elif kind == 5:
            changed[place : place + length] = rng.bytes(length)
        elif kind == 6:
            start = int(rng.integers(len(other)))
            changed[place : place + length] = other[start : start + length]
        else:
            del changed[max(16, place) :]
    return io.BytesIO(bytes(changed)).getvalue()


PART = Part("a broken JPEG, PNG, WebP, TIFF, GIF or BMP", 20_000, 300, _prepare, _run)
