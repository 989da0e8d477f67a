"""Codecs: how the grids of a store are stored.

| codec          | stored                                   | error                          |
|----------------|------------------------------------------|--------------------------------|
| `float16`      | float16                                  | float16 rounding               |
| `float32`      | float32                                  | none                           |
| `uint8`        | 8-bit levels, one scale per channel      | half a level, see `quantize`   |
| `float16-zstd` | float16, each row compressed (Zstandard) | float16 rounding               |

A codec is one class, registered with `register_codec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gridcap.common.errors import UserError
from gridcap.common.store.quantize import MAX_VALUE, dequantize, quantize, to_float32

ZSTD_FILTER = 32015  # number of the HDF5 filter, which the package hdf5plugin provides
ZSTD_LEVEL = 1  # higher levels of Zstandard save 1% more and are much slower
_HINT = "pip install 'gridcap[zstd]'"

Parts = list[np.ndarray]


class Codec(ABC):
    """How grids are stored.

    Attributes:
        name: value of `extract.dtype`.
        stored: type of the dataset `features`.
        read: type of the grids that readers return.
        compressed: whether each row of `features` is compressed.
    """

    name: ClassVar[str]
    stored: ClassVar[np.dtype[Any]]
    read: ClassVar[np.dtype[Any]]
    compressed: ClassVar[bool] = False

    def datasets(self, grid_shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return the shape and the type of one row of each dataset, named without a view; `features` comes first."""
        return {"features": (grid_shape, self.stored)}

    def row_bytes(self, grid_shape: tuple[int, ...]) -> int:
        """Return the size of one row in bytes, before compression."""
        shapes = self.datasets(grid_shape).values()
        return sum(int(np.prod(shape, dtype=np.int64)) * kind.itemsize for shape, kind in shapes)

    @abstractmethod
    def encode(self, grids: np.ndarray) -> tuple[Parts, np.ndarray]:
        """Encode grids.

        Args:
            grids: (b, *grid_shape) floats of any width; NaN for invalid images.

        Returns:
            One array (b, ...) per dataset, and (b,) bool: whether the codec can represent all values of a grid.
        """

    def decode(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Compute one grid of type `read` from its parts; not called if there is one part, of type `read`."""
        raise NotImplementedError

    def round_trip(self, grids: np.ndarray) -> np.ndarray:
        """Return grids (b, ..., channel) of type `read` as a store returns them, on which decoders were trained."""
        return grids


_CODECS: dict[str, Codec] = {}


def register_codec(codec: type[Codec]) -> type[Codec]:
    """Register the decorated codec under its name."""
    _CODECS[codec.name] = codec()
    return codec


def find_codec(name: str) -> Codec:
    """Return a codec by name.

    Raises:
        ValueError: there is no codec of this name.
    """
    if name not in _CODECS:
        raise ValueError(f"dtype is {name!r} (known: {', '.join(_CODECS)})")
    return _CODECS[name]


def codec_of(stored: np.dtype[Any], compressed: bool = False) -> Codec:
    """Return the codec of a dataset `features`.

    Args:
        stored: its type.
        compressed: whether its rows are compressed. Another program may have compressed those of any codec.

    Raises:
        ValueError: no codec stores this type.
    """
    codecs = [codec for codec in _CODECS.values() if codec.stored == stored]
    if not codecs:
        raise ValueError(f"features have the type {stored}")
    return next((codec for codec in codecs if codec.compressed == compressed), codecs[0])


def codec_names() -> list[str]:
    """Return the names of all codecs."""
    return list(_CODECS)


class _Float(Codec):
    """Floats without further encoding."""

    def encode(self, grids: np.ndarray) -> tuple[Parts, np.ndarray]:
        """Convert to the stored type; infinite values are not representable."""
        with np.errstate(over="ignore"):  # checked below, in the type that is stored
            stored = np.ascontiguousarray(grids, self.stored)
        return [stored], _finite_rows(stored.reshape(len(grids), -1))


@register_codec
class Float16(_Float):
    """Half precision."""

    name = "float16"
    stored = read = np.dtype("<f2")


@register_codec
class Float32(_Float):
    """Single precision."""

    name = "float32"
    stored = read = np.dtype("<f4")


@register_codec
class Uint8(Codec):
    """8-bit levels with one scale per image and channel, see `quantize`; for values from 0 on."""

    name = "uint8"
    stored = np.dtype("u1")
    read = np.dtype("<f2")

    def datasets(self, grid_shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return the datasets `features` and `scale`."""
        return {"features": (grid_shape, self.stored), "scale": (grid_shape[-1:], np.dtype("<f2"))}

    def encode(self, grids: np.ndarray) -> tuple[Parts, np.ndarray]:
        """Quantize; negative values are not representable."""
        values = to_float32(grids)
        flat = values.reshape(len(grids), -1)
        representable = np.asarray((flat.min(1) >= 0) & (flat.max(1) <= MAX_VALUE))  # false for NaN
        return list(quantize(values)), representable

    def decode(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Multiply levels by scales."""
        dequantize(parts[0], parts[1], out)

    def round_trip(self, grids: np.ndarray) -> np.ndarray:
        """Return grids with their quantization error."""
        out = np.empty_like(grids)
        for levels, scale, grid in zip(*quantize(grids), out, strict=True):
            dequantize(levels, scale, grid)
        return out


@register_codec
class Float16Zstd(Float16):
    """Half precision, each row compressed by Zstandard, for encoders that end with a ReLU: most values are zero."""

    name = "float16-zstd"
    compressed = True


def compress(row: np.ndarray) -> bytes:
    """Compress one row as a Zstandard frame with its size, as the HDF5 filter does. Releases Python's global lock.

    Raises:
        UserError: the package is not installed.
    """
    return bytes(_zstandard().ZstdCompressor(level=ZSTD_LEVEL).compress(row.data))


def decompress(data: bytes, out: np.ndarray) -> bool:
    """Decompress one row into an array. Releases Python's global lock.

    Returns:
        Whether the data is a valid frame of the expected size.

    Raises:
        UserError: the package is not installed.
    """
    library = _zstandard()
    try:
        content = library.ZstdDecompressor().decompress(data, max_output_size=out.nbytes)
    except library.ZstdError:
        return False
    if len(content) != out.nbytes:
        return False
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(content, np.uint8)
    return True


def _zstandard() -> Any:
    try:
        import hdf5plugin  # noqa: F401  # registers the filter, which creating a dataset requires
        import zstandard
    except ImportError as error:
        raise UserError("dtype float16-zstd needs zstandard and hdf5plugin", _HINT) from error
    return zstandard


def check_available(codec: Codec) -> None:
    """Check that the packages of a codec are installed.

    Raises:
        UserError: they are not.
    """
    if codec.compressed:
        _zstandard()


def codec_versions(codec: Codec) -> dict[str, str]:
    """Return the libraries that determine the stored bytes, for the provenance."""
    return {"zstandard": _zstandard().__version__} if codec.compressed else {}


def _finite_rows(flat: np.ndarray) -> np.ndarray:
    """Return which rows are finite: (b, n) floats -> (b,) bool.

    NumPy tests float16 values one by one. Read as integers, the non-finite ones are those from 0x7c00 on (as signed
    integers, if positive) and from 0xfc00 on (as unsigned integers, if negative), so that two maxima decide, about 20
    times as fast.
    """
    if flat.dtype == np.float16 and flat.dtype.isnative and flat.flags.c_contiguous:
        return (flat.view(np.int16).max(1) < 0x7C00) & (flat.view(np.uint16).max(1) < 0xFC00)  # type: ignore[no-any-return]
    return np.isfinite(flat).all(1)  # type: ignore[no-any-return]
