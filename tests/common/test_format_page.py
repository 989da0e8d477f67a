"""docs/format.md is enough to read a store: here it is read by its words, without our reader."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from gridcap.common.store.index_writer import IndexSpec, write_index
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
GRID = (4, 4, 128)  # 2048 bytes at least: three are aligned


@pytest.fixture(params=["float16", "float32", "uint8"])
def store(tmp_path, request):
    """Two shards of three rows, the fifth image refused; the grids that were written."""
    rng = np.random.default_rng(0)
    grids = rng.random((6, *GRID)).astype("float32" if request.param == "float32" else "float16")
    where = {"grid_shape": list(GRID), "dtype": request.param, "views": ["original"], "encoder": "x"}
    folder, images = tmp_path / "train", []
    for shard in range(2):
        part = slice(3 * shard, 3 * shard + 3)
        ids, names = list(range(100, 106))[part], [f"ä{i}.jpg" for i in range(6)][part]
        images.append(list(zip(ids, names, strict=True)))
        spec = ShardSpec(images[-1], GridLayout.from_provenance(where), where, shard, "p", "train")
        with ShardWriter(folder / f"{shard:05}.h5", spec) as writer:
            writer.write(0, grids[part].copy(), {1: "truncated"} if shard else {})
            writer.finish()
    index = tmp_path / "train.h5"
    write_index(index, IndexSpec(folder, ["00000.h5", "00001.h5"], ["p", "p"], images, 7, "train", where))
    return index, grids


def header(path: Path) -> dict:
    """The 4096 bytes, as the page has them."""
    data = path.read_bytes()
    block = data[:4096]
    values = json.loads(block)
    assert block == json.dumps(values, sort_keys=True).encode("ascii").ljust(4095) + b"\n"
    assert values["size"] == len(data)
    assert values["sha256"] == hashlib.sha256(data[4096:]).hexdigest()
    assert values["version"] == 3
    return values


def test_the_header_of_index_and_shards(store):
    index, _ = store
    assert header(index)["format"] == "gridcap-index"
    for number, path in enumerate(sorted(index.with_suffix("").glob("*.h5"))):
        found = header(path)
        assert set(found) == {"format", "version", "size", "sha256", "index", "plan", "rows", "invalid"}
        assert (found["format"], found["index"], found["rows"]) == ("gridcap-shard", number, 3)
        assert found["invalid"] == number


def test_rows_lie_where_the_page_says_and_mean_what_it_says(store):
    index, grids = store
    with h5py.File(index) as file:
        names = [name.decode() for name in file["shard_name"][:]]
        assert file["shard_rows"][:].tolist() == [3, 3]
        hashes = [value.decode() for value in file["shard_sha256"][:]]
        assert hashes == [header(index.parent / name)["sha256"] for name in names]
        assert file["image_id"][:].tolist() == list(range(100, 106))
        assert file["file_name"][4].decode() == "ä4.jpg"
        assert file["valid"][:].tolist() == [True, True, True, True, False, True]
        assert (file["invalid_row"][:].tolist(), file["invalid_reason"][0].decode()) == ([4], "truncated")
    row = 0
    for name in names:
        data = (index.parent / name).read_bytes()
        with h5py.File(index.parent / name) as file:
            features = file["features"]
            offset, size = features.id.get_offset(), features.dtype.itemsize * int(np.prod(GRID))
            assert offset % 4096 == 0
            for i in range(3):
                raw = data[offset + i * size : offset + (i + 1) * size]
                grid = np.frombuffer(raw, features.dtype).reshape(GRID)
                check = zlib.crc32(raw)
                if features.dtype == np.uint8:
                    scale = file["scale"][i]
                    check = zlib.crc32(scale.tobytes(), check)
                    grid = (grid * scale.astype(np.float32)).astype(np.float16)
                assert check == file["crc32"][i]
                if file["valid"][i]:
                    np.testing.assert_allclose(grid, grids[row], atol=0.004)
                else:
                    assert np.isnan(grid).all()
                row += 1


def test_the_page_names_every_dataset_and_attribute_there_is(store):
    index, _ = store
    named = set(re.findall(r"`([a-z0-9_]+)`", PAGE))
    for path in (index, *index.with_suffix("").glob("*.h5")):
        with h5py.File(path) as file:
            assert {*file, *file.attrs} <= named
