"""Measurements: Gridcap, a baseline, and an upper bound, alternating within the same run.

Benchmark machines are shared and noisy, so results are never compared across runs: every round runs all variants one
after the other, ratios are computed within a round, and the median over the rounds is reported.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import click

CPUINFO = Path("/proc/cpuinfo")
LIBRARIES = ("torch", "torchvision", "numpy", "h5py", "pillow")


@dataclass
class Row:
    """One line of the results table.

    Attributes:
        part: benchmark that the row belongs to.
        name: what was measured.
        unit: unit of the values: "images/s" or "captions/s" (higher is better), "s", "MiB", "operators",
            or "fraction".
        values, baseline, upper_bound: one value per round; the last two may be empty.
        baseline_name, upper_bound_name: short descriptions.
        targets: "minimum", "maximum", "speedup", or "fraction of upper bound" -> number.
        note: further conditions of the measurement.
    """

    part: str
    name: str
    unit: str
    values: list[float]
    baseline: list[float] = field(default_factory=list)
    upper_bound: list[float] = field(default_factory=list)
    baseline_name: str = ""
    upper_bound_name: str = ""
    targets: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def results(self) -> dict[str, float]:
        """Return the measured medians under the keys of `targets`."""
        median = statistics.median(self.values)
        results = {"minimum": median, "maximum": median}
        for name, other in (("speedup", self.baseline), ("fraction of upper bound", self.upper_bound)):
            if other:
                results[name] = statistics.median(a / b for a, b in zip(self.values, other, strict=True))
        return results

    def missed(self) -> list[str]:
        """Return the names of the missed targets."""
        results = self.results()
        return [
            name
            for name, target in self.targets.items()
            if (results[name] > target if name == "maximum" else results[name] < target)
        ]


def run_rounds(count: int, variants: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call every variant `count` times, alternating between them, and return the values by variant."""
    values: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(count):
        for name, variant in variants.items():
            values[name].append(variant())
    return values


def rate(items: int, work: Callable[[], object], min_seconds: float = 1.0) -> float:
    """Return items per second of `work`, which processes `items` per call and is repeated for `min_seconds`."""
    done, start = 0, time.perf_counter()
    while True:
        work()
        done += items
        if (seconds := time.perf_counter() - start) >= min_seconds:
            return done / seconds


def call_in_process(function: str, *arguments: Any) -> Any:
    """Call "module:function" with JSON arguments in a new process and return its JSON result.

    Raises:
        RuntimeError: the process failed; the message ends with its stderr.
    """
    module, _, name = function.partition(":")
    code = f"import json, sys; from {module} import {name}; print(json.dumps({name}(*json.loads(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments, default=str)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{function}{arguments}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def describe_machine() -> dict[str, Any]:
    """Return the hardware and the library versions of this machine."""
    import torch

    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) / 2**20
    lines = CPUINFO.read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()  # none on other processors than x86
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory (GiB)": round(memory),
        "instruction sets": sorted(flag for flag in flags if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }


def processor_name() -> str:
    """Return the name of the processor as reported by Linux."""
    names = [line for line in CPUINFO.read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def to_json(machine: Mapping[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Return the content of a results file."""
    return {"machine": dict(machine), "rows": [asdict(row) for row in rows]}


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return the machine and the rows of a results file.

    Raises:
        click.ClickException: the file is not a results file.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return tree["machine"], [Row(**row) for row in tree["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path} is not a results file of bench: pass another file, or delete it") from error
