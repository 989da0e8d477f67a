"""Unpickling of arrays: everything that programs write is read, and no code in the file is executed."""

from __future__ import annotations

import pickle
import resource
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gridcap.extract.importers.array_pickle import load_arrays

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def loaded(folder: Path, content: bytes) -> dict[Any, Any]:
    (folder / "a.pkl").write_bytes(content)
    return load_arrays(folder / "a.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", "i1", "u1", "<i8", ">u2", "?"])
def test_arrays_of_numbers_are_loaded(tmp_path: Path, protocol: int, dtype: str) -> None:
    whole = np.arange(24).reshape(2, 3, 4).astype(dtype)
    expected = {
        "c": whole,
        "fortran": np.asfortranarray(whole),
        "part": whole[:, ::2],
        "flat": whole[0, 0],
        "none": whole[:0],
    }
    arrays = loaded(tmp_path, pickle.dumps(expected, protocol))
    assert list(arrays) == list(expected)
    for key, array in expected.items():
        result = np.asarray(arrays[key])
        assert result.dtype == array.dtype
        np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_keys_and_lists_are_loaded(tmp_path: Path, protocol: int) -> None:
    expected = OrderedDict(
        [(np.int64(7), [1.5, 2.5]), (np.str_("ä.jpg"), [np.ones(2), np.zeros(2)]), (3, np.float32(2))]
    )
    arrays = loaded(tmp_path, pickle.dumps(expected, protocol))
    assert list(arrays) == [7, "ä.jpg", 3]
    assert [np.asarray(value).tolist() for value in arrays.values()] == [[1.5, 2.5], [[1, 1], [0, 0]], 2]


@pytest.mark.parametrize(
    "value", [np.array([{}]), np.zeros(2, "f4,i4"), np.zeros(2, "M8[s]"), np.zeros(2, "c8"), np.array([None])], ids=repr
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_other_types_are_rejected(tmp_path: Path, value: np.ndarray, protocol: int) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it contains arrays of"):
        loaded(tmp_path, pickle.dumps({"a": value}, protocol))


@pytest.mark.parametrize("value", [[1], {}, 7, "a"])
def test_other_objects_and_empty_dicts_are_rejected(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="not a dict of arrays"):
        loaded(tmp_path, pickle.dumps(value))


def test_a_state_that_would_crash_numpy_is_rejected(tmp_path: Path) -> None:
    """Found by fuzzing: numpy.dtype.__setstate__ with anything but a tuple crashed the process."""
    for state in (0, (), (3, "<"), (3, "<", None, None, None, -1), ("<",) * 8, None):
        crafted = _reduced(_Named("numpy", "dtype"), ("f4", False, True), state)
        with pytest.raises((ValueError, TypeError, pickle.UnpicklingError, IndexError)):
            np.asarray(loaded(tmp_path, b"\x80\x02}X\x01\x00\x00\x00a" + crafted + b"s.")["a"], np.float32)


@pytest.mark.parametrize(
    "announced", [b"\x96" + struct.pack("<Q", 1 << 33), b"\x8e" + struct.pack("<Q", 1 << 33), b"Nr\xff\xff\xff\x0f"]
)
def test_a_small_file_does_not_allocate_gigabytes(tmp_path: Path, announced: bytes) -> None:
    """Python's unpicklers allocate announced sizes and memo tables at once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((pickle.UnpicklingError, EOFError, KeyError)):
        loaded(tmp_path, b"\x80\x05}X\x01\x00\x00\x00a" + announced)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19, "KiB"


_EXPANDS = [1.0] * 10
for _ in range(7):
    _EXPANDS = [_EXPANDS] * 10  # 10^8 numbers in 300 bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\x80\x02})" + b"\x85" * 2_000_000 + b"K\x02s.",
            "a key of its dict is a tuple",
        ),  # hashing crashes the process
        (b"\x80\x02}K\x01\x85" + b"2\x86" * 40 + b"K\x02s.", "a key of its dict is a tuple"),  # hashing takes years
        (b"\x80\x02}(K\x01\x85K\x02u.", "a key of its dict is a tuple"),
        (b"(K\x01\x85K\x02d.", "a key of its dict is a tuple"),
        (b"\x80\x02ccollections\nOrderedDict\n]]K\x01\x85aK\x02aa\x85R.", "a key of its dict is a tuple"),
        (b"\x80\x04\x8f.", "it contains a set"),
        (b"\x80\x02}X\x01\x00\x00\x00ac_codecs\nencode\n}b.", "a state of an object that is not an array"),
        (b"\x80\x02cfoo\nx\x1b[2Jdone\n.", r"it contains 'foo\.x\\x1b\[2Jdone'"),
        (pickle.dumps({"a": _EXPANDS}), "nested lists"),
        (pickle.dumps({"a": [[[[[[[[[[1]]]]]]]]]]}), "nested lists"),
    ],
    ids=range(10),
)
def test_malicious_pickles_are_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=message):
        loaded(tmp_path, content)


def test_python_2_pickles_are_loaded(tmp_path: Path) -> None:
    array = np.array([[1.5, -2.5, 3e-5], [7, 8, 9]], "<f4")
    raw, type_end = array.tobytes(), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = (
        b"\x80\x02}q\x01U\x05a.jpgq\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<" + type_end + b"\x89U"
    )
    arrays = loaded(tmp_path, content + bytes([len(raw)]) + raw + b"tbs.")
    np.testing.assert_array_equal(np.asarray(arrays["a.jpg"]), array)


def test_corrupted_pickles_give_arrays_or_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for protocol in PROTOCOLS:
        whole = pickle.dumps({"a.jpg": np.ones((4, 3), np.float16), "12": np.ones((2, 2, 3), np.float32)}, protocol)
        for _ in range(400):
            changed = bytearray(whole)
            for position in rng.integers(len(whole), size=rng.integers(1, 4)):
                changed[position] = rng.integers(256)
            try:
                arrays = loaded(tmp_path, bytes(changed))
            except Exception:
                continue
            for value in arrays.values():
                try:
                    np.asarray(value)
                except Exception:
                    continue


class _Named:
    def __init__(self, module: str, name: str) -> None:
        self.code = f"c{module}\n{name}\n".encode()


def _reduced(function: _Named, arguments: tuple[object, ...], state: object) -> bytes:
    """Return the opcodes of `function(*arguments)` with a state."""
    body = pickle.dumps(arguments, 2)[2:-1], pickle.dumps(state, 2)[2:-1]
    return function.code + body[0] + b"R" + body[1] + b"b"
