"""Run cases of one part in this process, which may crash, and print one JSON line per case."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np

from tests.torture.case import FailedError, Part

PARTS = {  # name -> its Part
    "kill-extraction": "tests.torture.kill:EXTRACTION",
    "kill-training": "tests.torture.kill:TRAINING",
    "full-disk": "tests.torture.full_disk:PART",
    "corruption": "tests.torture.corruption:PART",
    "images": "tests.torture.images:PART",
    "captions": "tests.torture.captions:PART",
    "soak": "tests.torture.soak:PART",
    "malicious": "tests.torture.malicious:PART",
    "mismatch": "tests.torture.mismatch:PART",
    "fuzz": "tests.torture.fuzz:PART",
}
PREPARED = "prepared"


def load_part(name: str) -> Part:
    """Import a part by name."""
    module, _, attribute = PARTS[name].partition(":")
    part: Part = getattr(importlib.import_module(module), attribute)
    return part


def main(name: str, folder: Path, seed: int, first: int, last: int) -> None:
    """Run the cases `first` to `last - 1`. Each has its own random numbers, so it can be rerun separately."""
    import torch

    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    part, marker = load_part(name), folder.parent / f"{folder.name}.{PREPARED}"
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
