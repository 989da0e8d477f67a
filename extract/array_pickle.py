"""Pickled dicts of numpy arrays, read without running anything that the file names, numpy's own code included.

`pickle` and numpy trust what they read: the unpickler in C takes gigabytes for a number in a file of a few bytes, and
numpy's `__setstate__` of arrays and types reads memory that is not its own when its argument is not what it wrote. So
the arrays are built here, from their bytes, by the unpickler written in Python.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

_TYPE = re.compile("[fiubUS][0-9]{1,4}")  # numbers and short texts, by their bytes or letters
_ORDERS = ("<", ">", "|", "=")


def load_arrays(path: Path) -> dict[Any, Any]:
    """Read a pickled dict.

    Returns:
        Its keys, and its values as something that `numpy.asarray` turns into an array.

    Raises:
        ValueError: no dict, or an empty one.
        Exception: whatever a damaged pickle leads its reader to; `pickle.UnpicklingError` for one that names
            anything but arrays and plain containers.
    """
    loaded = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()  # as Python 2 wrote bytes
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError("holds no dict of arrays: file name or image id -> array")
    return loaded


class _Type:
    """What a pickle says of a dtype."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or not _TYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"it holds arrays of {str(name)[:20]!r}, and only numbers are read")
        self._dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        _version, order, subarray, names, fields, *_ = state
        if order not in _ORDERS or not subarray is names is fields is None:
            raise pickle.UnpicklingError("it holds arrays of arrays or of records, and only numbers are read")
        self._dtype = self._dtype.newbyteorder(order)

    def read(self, content: Any) -> np.ndarray:
        """The values that stand in bytes, on one axis."""
        return np.frombuffer(content, self._dtype)


class _Array:
    """An array; `numpy.asarray` takes it for one, also in lists."""

    def __init__(self, array: np.ndarray | None = None) -> None:
        self._array = array

    def __setstate__(self, state: Any) -> None:
        shape, dtype, by_columns, content = state[-4:]
        self._array = _shaped(content, dtype, shape, "F" if by_columns else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._array is None:
            raise ValueError("an array without its content")
        return self._array if dtype is None else self._array.astype(dtype)


def _shaped(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(dtype, _Type) or not isinstance(content, bytes | bytearray | memoryview):
        raise pickle.UnpicklingError("it holds arrays of objects, and only numbers are read")
    return dtype.read(content).reshape(tuple(shape), order=order)


def _scalar(dtype: Any, content: Any) -> Any:
    """A number or a text of numpy, as Python's own."""
    return _shaped(content, dtype, (), "C").item()


def _latin(text: str, encoding: str) -> bytes:
    """The bytes that old protocols write as a text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes as {str(encoding)[:20]!r}")
    return text.encode("latin1")


def _no_bytes(*given: object) -> bytes:
    """What old protocols name for no bytes at all."""
    if given:
        raise pickle.UnpicklingError("it holds bytes that are yet to be made")
    return b""


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _latin,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): None,  # named beside `_reconstruct`
}
for _core in ("core", "_core"):
    _NAMES[f"numpy.{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _NAMES[f"numpy.{_core}.multiarray", "scalar"] = _scalar
    _NAMES[f"numpy.{_core}.numeric", "_frombuffer"] = lambda *given: _Array(_shaped(*given))


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(
                f"it holds {module}.{name}, and only numpy arrays and plain containers are read"
            )
        return _NAMES[module, name]

    def _load_bytearray(self) -> None:
        """The bytes that there are: Python's own takes the memory for as many as are announced."""
        read: Callable[[int], bytes] = self.read  # type: ignore[attr-defined]
        (announced,) = struct.unpack("<Q", read(8))
        self.append(bytearray(read(announced)))  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray}
