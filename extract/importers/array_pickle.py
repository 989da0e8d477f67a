"""Safe unpickling of dicts of NumPy arrays: nothing that the file names is executed, not even NumPy's own code.

`pickle` and NumPy trust their input: the C unpickler allocates gigabytes for a size in a file of a few bytes, and
NumPy's `__setstate__` of arrays and dtypes reads out of bounds for malformed arguments. Arrays are therefore built here
from their bytes, by the pure Python unpickler.
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

_TYPE = re.compile("[fiubUS][0-9]{1,4}")  # numbers and short strings
MAX_DEPTH = 8  # of nested lists
_KEYS = (str, bytes, int, float)
_ORDERS = ("<", ">", "|", "=")


def load_arrays(path: Path) -> dict[Any, Any]:
    """Load a pickled dict.

    Returns:
        Key -> value, where `numpy.asarray` converts each value to an array.

    Raises:
        ValueError: not a dict, or an empty one.
        pickle.UnpicklingError: the pickle names anything but arrays and plain containers.
        Exception: other types for a corrupted pickle.
    """
    content = path.read_bytes()
    loaded = _Unpickler(io.BytesIO(content), encoding="latin1").load()  # as bytes were written by Python 2
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError("not a dict of arrays (file name or image id -> array)")
    _check_lists(loaded.values(), len(content))
    return loaded


def _check_lists(values: Iterable[Any], max_numbers: int) -> None:
    """Reject lists that expand by sharing: a file has at least one byte for each number in its lists."""
    stack = [(value, 0) for value in values]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, list | tuple):
            max_numbers -= len(value)
            if depth >= MAX_DEPTH or max_numbers < 0:
                raise pickle.UnpicklingError("it contains deeply nested lists; only arrays of numbers are supported")
            stack += [(item, depth + 1) for item in value if isinstance(item, list | tuple)]


class _Type:
    """Stand-in for a pickled dtype."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or not _TYPE.fullmatch(name):
            shown = name[:20] if isinstance(name, str) else type(name).__name__
            raise pickle.UnpicklingError(f"it contains arrays of {shown!r}; only numbers are supported")
        self._dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        _version, order, subarray, names, fields, *_ = state
        if order not in _ORDERS or not subarray is names is fields is None:
            raise pickle.UnpicklingError("it contains arrays of arrays or of records; only numbers are supported")
        self._dtype = self._dtype.newbyteorder(order)

    def read(self, content: Any) -> np.ndarray:
        """Return the values in a buffer, as a one-dimensional array."""
        return np.frombuffer(content, self._dtype)


class _Array:
    """Stand-in for a pickled array; `numpy.asarray` converts it, also inside lists."""

    def __init__(self, array: np.ndarray | None = None) -> None:
        self._array = array

    def __setstate__(self, state: Any) -> None:
        shape, dtype, by_columns, content = state[-4:]
        self._array = _shaped(content, dtype, shape, "F" if by_columns else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._array is None:
            raise ValueError("an array without content")
        return self._array if dtype is None else self._array.astype(dtype)


def _shaped(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(dtype, _Type) or not isinstance(content, bytes | bytearray | memoryview):
        raise pickle.UnpicklingError("it contains arrays of objects; only numbers are supported")
    return dtype.read(content).reshape(tuple(shape), order=order)


def _scalar(dtype: Any, content: Any) -> Any:
    """Return a NumPy number or string as a Python object."""
    return _shaped(content, dtype, (), "C").item()


def _latin(text: str, encoding: str) -> bytes:
    """Return the bytes that old protocols write as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("it contains bytes in an unexpected encoding")
    return text.encode("latin1")


def _empty_bytes(*arguments: object) -> bytes:
    """Return empty bytes, which old protocols write as a call."""
    if arguments:
        raise pickle.UnpicklingError("it contains a call of bytes with arguments")
    return b""


def _mapping(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    """Build the dict that replaces an OrderedDict."""
    return {_checked_key(key): value for key, value in pairs}


def _checked_key(key: Any) -> Any:
    """Return a key of a supported type; hashing other types may never end or crash the process."""
    if not isinstance(key, _KEYS):
        raise pickle.UnpicklingError(f"a key of its dict is a {type(key).__name__}, not a file name or image id")
    return key


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _mapping,
    ("_codecs", "encode"): _latin,
    ("__builtin__", "bytes"): _empty_bytes,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): None,  # an argument of `_reconstruct`, never called
}
for _core in ("core", "_core"):
    _NAMES[f"numpy.{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _NAMES[f"numpy.{_core}.multiarray", "scalar"] = _scalar
    _NAMES[f"numpy.{_core}.numeric", "_frombuffer"] = lambda *arguments: _Array(_shaped(*arguments))


class _Unpickler(pickle._Unpickler):
    """Pure Python unpickler restricted to stand-ins for arrays and plain containers."""

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            full_name = f"{module}.{name}"[:80]
            shown = full_name if full_name.isprintable() else ascii(full_name)
            raise pickle.UnpicklingError(f"it contains {shown}; only NumPy arrays and plain containers are supported")
        return _NAMES[module, name]

    def _load_bytearray(self) -> None:
        """Read the available bytes; the base class would allocate the number that the file announces."""
        (announced,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(announced)))

    def _load_build(self) -> None:
        """Set the state of one of our stand-ins only: functions have a state, too."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Type | _Array):
            raise pickle.UnpicklingError("it contains a state of an object that is not an array")
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

    def _reject_set(self) -> None:
        raise pickle.UnpicklingError("it contains a set; only arrays and plain containers are supported")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _load_bytearray,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_item,
        pickle.SETITEMS[0]: _load_items,
        pickle.DICT[0]: _load_dict,
        **dict.fromkeys((pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), _reject_set),
    }
