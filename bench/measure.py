"""What a measurement is: ours beside a baseline and a limit, taken in turns in the same run.

These machines are shared and noisy, so nothing is compared with a number from another day: a round runs all sides
one after the other, a ratio is taken within each round, and the median of the rounds counts.
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

LIBRARIES = ("torch", "torchvision", "numpy", "h5py", "pillow")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        part: which of the benchmarks it belongs to.
        name: what was measured.
        unit: of the values: "images/s", "captions/s" (more is better), "s", "MiB" (less is better), "share".
        ours, baseline, limit: a value a round; the last two may be empty.
        baseline_is, limit_is: what they are, in a few words.
        wanted: the bars: "value", "of baseline", "of limit", "at most" -> number.
        note: what else a reader must know.
    """

    part: str
    name: str
    unit: str
    ours: list[float]
    baseline: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    baseline_is: str = ""
    limit_is: str = ""
    wanted: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def found(self) -> dict[str, float]:
        """What stands beside `wanted`, under the same names."""
        values = {"value": statistics.median(self.ours), "at most": statistics.median(self.ours)}
        for name, other in (("of baseline", self.baseline), ("of limit", self.limit)):
            if other:
                values[name] = statistics.median(a / b for a, b in zip(self.ours, other, strict=True))
        return values

    def missed(self) -> list[str]:
        """The bars that were not reached."""
        found = self.found()
        return [
            name for name, bar in self.wanted.items() if (found[name] > bar if name == "at most" else found[name] < bar)
        ]


def rounds(count: int, sides: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call every side `count` times, in turns."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count):
        for name, side in sides.items():
            values[name].append(side())
    return values


def rate(items: int, work: Callable[[], object], least_seconds: float = 1.0) -> float:
    """Items a second: `work`, which does `items` of them, repeated for as long as it takes to be sure."""
    done, begin = 0, time.perf_counter()
    while True:
        work()
        done += items
        if (took := time.perf_counter() - begin) >= least_seconds:
            return done / took


def fresh(function: str, *arguments: Any, threads: int | None = None) -> Any:
    """Call "module:function" with JSON arguments in a process of its own, and give what it returns.

    Args:
        threads: that torch may use there; None leaves it to torch.
    """
    module, _, name = function.partition(":")
    code = f"import json, sys; from {module} import {name}; print(json.dumps({name}(*json.loads(sys.argv[1]))))"
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments, default=str)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{function}{arguments}: ended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Where this is measured, and with what."""
    import torch

    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) / 2**20
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory (GiB)": round(memory),
        "arithmetic": sorted(flag for flag in flags if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }


def processor() -> str:
    """The processor's name, as Linux gives it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def as_tree(where: Mapping[str, Any], rows: list[Row]) -> dict[str, Any]:
    """What a results file holds."""
    return {"machine": dict(where), "rows": [asdict(row) for row in rows]}


def read_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of a results file.

    Raises:
        click.ClickException: it is no such file.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return tree["machine"], [Row(**row) for row in tree["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path} is no results file of bench: name another, or remove it") from error
