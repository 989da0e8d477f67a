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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

_TYPE = re.compile("[fiubUS][0-9]{1,4}")  # numbers and short texts, by their bytes or letters
_DEEPEST = 8  # lists in each other
_KEYS = (str, bytes, int, float)
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
    content = path.read_bytes()
    loaded = _Unpickler(io.BytesIO(content), encoding="latin1").load()  # as Python 2 wrote bytes
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError("holds no dict of arrays: file name or image id -> array")
    _check_lists(loaded.values(), len(content))
    return loaded


def _check_lists(values: Iterable[Any], most: int) -> None:
    """Refuse lists that hold themselves over and over: a file has a byte at least for each number in them."""
    left = [(value, 0) for value in values]
    while left:
        value, depth = left.pop()
        if isinstance(value, list | tuple):
            most -= len(value)
            if depth >= _DEEPEST or most < 0:
                raise pickle.UnpicklingError("it holds lists in lists in lists, and only arrays of numbers are read")
            left += [(item, depth + 1) for item in value if isinstance(item, list | tuple)]


class _Type:
    """What a pickle says of a dtype."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or not _TYPE.fullmatch(name):
            said = name[:20] if isinstance(name, str) else type(name).__name__
            raise pickle.UnpicklingError(f"it holds arrays of {said!r}, and only numbers are read")
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
        raise pickle.UnpicklingError("it holds bytes in another encoding than pickle writes")
    return text.encode("latin1")


def _no_bytes(*given: object) -> bytes:
    """What old protocols name for no bytes at all."""
    if given:
        raise pickle.UnpicklingError("it holds bytes that are yet to be made")
    return b""


def _mapping(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    """What an OrderedDict is read as."""
    found = {}
    for key, value in pairs:
        found[_checked_key(key)] = value
    return found


def _checked_key(key: Any) -> Any:
    """A key; that of another type could take for ever to be hashed, or the process with it."""
    if not isinstance(key, _KEYS):
        raise pickle.UnpicklingError(f"a key of its dict is a {type(key).__name__}, and not a file name or an image id")
    return key


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _mapping,
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
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            said = f"{module}.{name}"[:80]
            said = said if said.isprintable() else ascii(said)
            raise pickle.UnpicklingError(f"it holds {said}, and only numpy arrays and plain containers are read")
        return _NAMES[module, name]

    def _load_bytearray(self) -> None:
        """The bytes that there are: Python's own takes the memory for as many as are announced."""
        (announced,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(announced)))

    def _load_build(self) -> None:
        """A state, for one of ours alone: functions have one too."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Type | _Array):
            raise pickle.UnpicklingError("it holds a state of something that is no array")
        self.stack[-1].__setstate__(state)

    def _load_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_checked_key(key)] = value

    def _load_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_checked_key(key)] = value

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_mapping(zip(items[::2], items[1::2], strict=True)))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds a set, and only arrays and plain containers are read")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _load_bytearray,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_item,
        pickle.SETITEMS[0]: _load_items,
        pickle.DICT[0]: _load_dict,
        **dict.fromkeys((pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), _refuse),
    }
