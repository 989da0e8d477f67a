"""How long a command takes before it works."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.inputs import make_captions, make_photos, make_store
from bench.measure import Row, rounds

COMMANDS = {
    "extract-features": "gridcap.extract.cli:main",
    "train-decoder": "gridcap.train.cli:train_decoder",
    "evaluate-decoder": "gridcap.train.evaluate_cli:evaluate_decoder",
    "caption-images": "gridcap.caption.cli:main",
}


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Seconds to the help, to the first image and to the first step."""
    count = 1 if quick else 3
    for command in COMMANDS:
        values = rounds(
            count, {"baseline": lambda: _seconds(["-c", "pass"]), "ours": partial(_command, command, "--help")}
        )
        yield Row(
            "starting", f"{command} --help", "s", values["ours"], values["baseline"], baseline_is="python -c pass"
        )
    photo, captions = make_photos(work / "one", 1), make_captions(work / "few.json", 13)
    store, numbers = make_store(work / "few.h5", 13), iter(range(100))

    def first_image() -> float:
        output = work / f"first-{next(numbers)}.h5"
        return _command(
            "extract-features", "--images", photo, "--output", output, "--weights", "random", "--compile", "off"
        )

    def first_step() -> float:
        output = work / f"first-{next(numbers)}"
        return _command(
            "train-decoder", "--features", store, "--annotations", captions, "--output", output, "--epochs", 1
        )

    for name, side in (("extract-features of one image", first_image), ("train-decoder of one step", first_step)):
        yield Row("starting", name, "s", rounds(count, {"ours": side})["ours"], note="start to end")


def _command(name: str, *arguments: object) -> float:
    module, _, function = COMMANDS[name].partition(":")
    return _seconds(["-c", f"from {module} import {function}; {function}()", *map(str, arguments)])


def _seconds(arguments: Sequence[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - begin
