"""Malformed captions files and configurations: an error that names the file, or counted invalid entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gridcap.common.captions.read import read_captions
from gridcap.common.config import load_config
from gridcap.common.errors import GridcapError
from tests.torture.case import Part, require
from tests.torture.images import mutate_bytes

INT64 = range(-(2**63), 2**63)


def _junk(rng: np.random.Generator) -> Any:
    """Return an unexpected value."""
    nested: Any = []
    for _ in range(int(rng.choice([3, 300, 5000]))):
        nested = [nested]
    unusual_text = "".join(chr(int(rng.integers(0x20, 0xD7FF) + 0x10000 * rng.integers(17))) for _ in range(40))
    choices: list[Any] = [
        None,
        True,
        -1,
        0,
        2**63,
        -(2**63) - 1,
        10**400,
        1.5,
        float("nan"),
        float("inf"),
        "",
        " ",
        "\x00",
        "../a.jpg",
        "/etc/passwd",
        unusual_text,
        "\ud800",
        "word " * 10_000,
        "x" * 100_000,
        [],
        {},
        nested,
        {"": {"": None}},
        "<script>alert(1)</script>",
    ]
    return choices[int(rng.integers(len(choices)))]


def _coco() -> dict[str, Any]:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)]
    return {"images": images, "annotations": [{"id": i, "image_id": i % 6, "caption": f"a {i}"} for i in range(18)]}


def _karpathy() -> dict[str, Any]:
    sentences = [{"raw": "a thing", "tokens": ["a", "thing"], "imgid": 0, "sentid": 0}]
    images = [
        {"filename": f"{i}.jpg", "filepath": "val2014", "cocoid": i, "split": "train", "sentences": sentences}
        for i in range(6)
    ]
    return {"images": images, "dataset": "coco"}


def _list() -> list[dict[str, Any]]:
    return [{"image": f"{i}.jpg", "caption": ["a thing"] * (i % 3), "split": "train"} for i in range(6)]


def _config() -> dict[str, Any]:
    return {"seed": 1, "data": {"splits": {"train": {"images": "a", "annotations": "b"}}}, "train": {"epochs": 2}}


def mutate_tree(tree: Any, rng: np.random.Generator) -> Any:
    """Replace, remove, duplicate, or add an item at a random place of nested lists and dicts, in place."""
    node = tree
    parents: list[tuple[Any, Any]] = []
    while isinstance(node, list | dict) and node and (not parents or rng.random() < 0.8):
        key: Any = int(rng.integers(len(node))) if isinstance(node, list) else list(node)[int(rng.integers(len(node)))]
        parents.append((node, key))
        node = node[key]
    if not parents:
        return _junk(rng)
    owner, key = parents[-1]
    kind = int(rng.integers(4))
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif kind == 2 and isinstance(owner, dict):
        owner[("", "id", "\x00", "x" * 100_000, "caption")[int(rng.integers(5))]] = _junk(rng)
    else:
        owner[key] = _junk(rng)
    return tree


def _mutate_repeatedly(tree: Any, rng: np.random.Generator) -> Any:
    for _ in range(int(rng.integers(1, 4))):
        tree = mutate_tree(tree, rng)
    return tree


def _run(folder: Path, rng: np.random.Generator) -> str:
    kind = ("coco", "karpathy", "list", "csv", "yaml")[int(rng.integers(5))]
    path = folder / f"case.{'json' if kind in ('coco', 'karpathy', 'list') else kind}"
    if kind == "csv":
        text = "image,caption\n" + "".join(f'{i}.jpg,"a ""thing"", {i}"\n' for i in range(20))
        content = text.encode()
    else:
        tree = _mutate_repeatedly({"coco": _coco, "karpathy": _karpathy, "list": _list, "yaml": _config}[kind](), rng)
        try:
            content = (json.dumps(tree) if kind != "yaml" else yaml.safe_dump(tree)).encode("utf-8", "surrogatepass")
        except (RecursionError, ValueError, yaml.YAMLError):  # too deeply nested for the writer
            content = b"[" * 100_000
    if kind == "csv" or rng.random() < 0.3:
        content = mutate_bytes(content, b'{"images": [], "annotations": []}' * 3, rng)
    path.write_bytes(content)
    try:
        if kind == "yaml":
            load_config(path)
            return "read"
        captions = read_captions(path, "train")
        for record in captions.records:
            require(record.image_id in INT64, f"invalid id {record.image_id}")
            require(all(isinstance(text, str) and text for text in record.captions), "a caption that is not a string")
            record.file_name.encode()
        return "read, invalid entries counted" if captions.problems.counts else "read"
    except GridcapError as error:
        require(path.name in error.message, f"the error does not name the file: {error.message}")
        return "error that names the file"


PART = Part("malformed captions file (COCO, Karpathy, CSV) or pipeline.yaml", 5000, 150, lambda folder: None, _run)
