"""`make torture`: run fault injection, seeded and resumable, and print a table of faults, cases, and failures."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import click

from gridcap.common.files import write_json
from gridcap.common.progress import progress_bar
from tests.torture.worker import PARTS, load_part

CASES_PER_PROCESS = 500
TIMEOUT = 120  # seconds without output after which a case counts as hanging


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(list(PARTS)), help="fault to inject  [default: all]")
@click.option("--quick", is_flag=True, help="run at most a tenth of the cases")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="random seed")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("torture_output"),
    show_default=True,
    help="output folder",
)
def main(names: tuple[str, ...], quick: bool, seed: int, output: Path) -> None:
    """Inject faults into everything that is stored or read. Rerun the command to resume."""
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    lines = ["| fault | cases | failures | outcomes | seconds |", "|---|---|---|---|---|"]
    for name in names or PARTS:
        if missing := load_part(name).missing():
            click.echo(f"skipped: {name} requires {missing}", err=True)
            continue
        state = run_part(name, load_part(name).quick if quick else load_part(name).cases, seed, output)
        outcomes = "; ".join(f"{count} {text}" for text, count in sorted(state["outcomes"].items()))
        row = (load_part(name).fault, state["done"], len(state["failures"]), outcomes, f"{state['seconds']:.0f}")
        lines.append(f"| {' | '.join(map(str, row))} |")
        for failure in state["failures"]:
            click.echo(f"FAILED: {name}, case {failure['case']} of seed {seed}: {failure['failure']}", err=True)
        failed = failed or bool(state["failures"])
    click.echo("\n".join(lines))
    if failed:
        raise SystemExit(1)


def run_part(name: str, cases: int, seed: int, output: Path) -> dict[str, Any]:
    """Run the remaining cases of a part and return the state of all its cases. It is stored after an interrupt, too."""
    state_file = output / f"{name}-{seed}.json"
    state: dict[str, Any] = {"done": 0, "failures": [], "outcomes": {}, "seconds": 0.0}
    if state_file.exists():
        state = json.loads(state_file.read_text(encoding="utf-8"))
    outcomes = Counter(state["outcomes"])
    with progress_bar(total=cases, initial=min(cases, state["done"]), desc=name, unit="case") as bar:
        while state["done"] < cases:
            start, last = time.monotonic(), min(cases, state["done"] + CASES_PER_PROCESS)
            try:
                with contextlib.closing(_results(name, output / name, seed, state["done"], last)) as results:
                    for result in results:
                        state["done"] = result["case"] + 1
                        if "failure" in result:
                            state["failures"].append(result)
                        else:
                            outcomes[result["outcome"]] += 1
                        bar.update()
            finally:
                state["seconds"] += time.monotonic() - start
                state["outcomes"] = dict(outcomes)
                write_json(state_file, state)
    return state


def _results(name: str, folder: Path, seed: int, first: int, last: int) -> Generator[dict[str, Any]]:
    """Run cases in a process and yield their results; if it dies or hangs, the current case fails."""
    command = [sys.executable, "-m", "tests.torture.worker", name, str(folder), str(seed), str(first), str(last)]
    current = first
    with (folder.parent / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            while line := _read_line(process.stdout, TIMEOUT):
                yield json.loads(line)
                current += 1
            if hangs := line is None:
                process.kill()
            status = process.wait()
        finally:  # also if the caller is interrupted
            process.kill()
            process.wait()
    if current < last:
        reason = f"no output for {TIMEOUT} s" if hangs else f"the process exited with status {status}"
        yield {"case": current, "failure": f"{reason}: see {folder.parent / f'{name}.log'}"}


def _read_line(stream: Any, seconds: float) -> bytes | None:
    """Return the next line, b"" at the end of the stream, or None after a timeout."""
    ready, _, _ = select.select([stream], [], [], seconds)
    return bytes(stream.readline()) if ready else None


if __name__ == "__main__":
    main()
