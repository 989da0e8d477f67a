"""Startup time of the commands."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.inputs import make_captions, make_photos, make_store
from bench.measure import Row, run_rounds

COMMANDS = {
    "extract-features": "gridcap.extract.cli:main",
    "train-decoder": "gridcap.train.cli:train_decoder",
    "evaluate-decoder": "gridcap.train.evaluate_cli:evaluate_decoder",
    "caption-images": "gridcap.caption.cli:main",
}


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Measure seconds for `--help`, for extracting one image, and for one training step."""
    count = 1 if quick else 3
    for command in COMMANDS:
        values = run_rounds(
            count, {"baseline": lambda: _run_python(["-c", "pass"]), "gridcap": partial(_run, command, "--help")}
        )
        yield Row(
            "startup", f"{command} --help", "s", values["gridcap"], values["baseline"], baseline_name="python -c pass"
        )
    photo, captions = make_photos(work / "one", 1), make_captions(work / "few.json", 13)
    store, numbers = make_store(work / "few.h5", 13), iter(range(100))

    def first_image() -> float:
        output = work / f"first-{next(numbers)}.h5"
        return _run(
            "extract-features", "--images", photo, "--output", output, "--weights", "random", "--compile", "off"
        )

    def first_step() -> float:
        output = work / f"first-{next(numbers)}"
        return _run("train-decoder", "--features", store, "--annotations", captions, "--output", output, "--epochs", 1)

    for name, variant in (("extract-features, one image", first_image), ("train-decoder, one step", first_step)):
        yield Row("startup", name, "s", run_rounds(count, {"gridcap": variant})["gridcap"], note="whole process")


def _run(command: str, *arguments: object) -> float:
    module, _, function = COMMANDS[command].partition(":")
    return _run_python(["-c", f"from {module} import {function}; {function}()", *map(str, arguments)])


def _run_python(arguments: Sequence[str]) -> float:
    """Run a Python process and return its duration in seconds."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - start
