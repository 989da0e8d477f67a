"""Run some cases of one part, and print a line for each: what comes of it, in a process that may die of it."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np

from tests.torture.case import FailedError, Part

PARTS = {  # name -> where its Part stands
    "kill-extraction": "tests.torture.kill:EXTRACTION",
    "kill-training": "tests.torture.kill:TRAINING",
    "disk": "tests.torture.disk:PART",
    "bits": "tests.torture.bits:PART",
    "images": "tests.torture.images:PART",
    "captions": "tests.torture.captions:PART",
    "soak": "tests.torture.soak:PART",
    "hostile": "tests.torture.hostile:PART",
    "mismatch": "tests.torture.mismatch:PART",
    "fuzz": "tests.torture.fuzz:PART",
}
_PREPARED = "prepared"


def find(name: str) -> Part:
    """A part by its name."""
    module, _, attribute = PARTS[name].partition(":")
    part: Part = getattr(importlib.import_module(module), attribute)
    return part


def main(name: str, folder: Path, seed: int, first: int, last: int) -> None:
    """Cases `first` to `last - 1`: each has random numbers of its own, so it can be run again alone."""
    import torch

    torch.set_num_threads(1)  # and children that are forked find no threads to wait for
    part, marker = find(name), folder.parent / f"{folder.name}.{_PREPARED}"
    if not marker.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part.prepare(folder)
        marker.touch()
    for number in range(first, last):
        rng = np.random.default_rng([seed, list(PARTS).index(name), number])
        try:
            result = {"case": number, "outcome": part.run(folder, rng)}
        except FailedError as error:
            result = {"case": number, "failure": str(error)}
        except Exception as error:
            result = {"case": number, "failure": f"{type(error).__name__}: {error}"[:300]}
            traceback.print_exc()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
