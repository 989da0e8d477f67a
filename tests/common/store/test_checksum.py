"""CRC-32 is that of zlib, with and without ISA-L."""

from __future__ import annotations

import importlib
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gridcap.common.store.checksum as checksum_module


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_crc32_is_that_of_zlib(data: bytes, previous: int) -> None:
    assert checksum_module.crc32(memoryview(data), previous) == zlib.crc32(data, previous)


def test_zlib_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "isal", None)
        patch.delitem(sys.modules, "isal.isal_zlib", raising=False)
        assert importlib.reload(checksum_module).crc32 is zlib.crc32
    importlib.reload(checksum_module)
