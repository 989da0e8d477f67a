"""`make torture`: seeded, resumable; a table of faults, cases and failures."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from gridcap.common.files import write_json
from gridcap.common.progress import progress_bar
from tests.torture.worker import PARTS, find

_AT_ONCE = 500  # cases in one process
_SILENCE = 120  # seconds without a word after which a case counts as hanging


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(list(PARTS)), help="Just these  [default: all]")
@click.option("--quick", is_flag=True, help="A tenth of the cases, or less.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all random numbers.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("torture_output"), show_default=True)
def main(names: tuple[str, ...], quick: bool, seed: int, output: Path) -> None:
    """Torture what is kept and what is read; stopped, the same command goes on where it was."""
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    lines = ["| fault | cases | failures | outcomes | seconds |", "|---|---|---|---|---|"]
    for name in names or PARTS:
        if missing := find(name).missing():
            click.echo(f"left out: {name}: this machine lacks {missing}", err=True)
            continue
        state = run_part(name, find(name).quick if quick else find(name).cases, seed, output)
        outcomes = "; ".join(f"{count} {text}" for text, count in sorted(state["outcomes"].items()))
        row = (find(name).fault, state["done"], len(state["failures"]), outcomes, f"{state['seconds']:.0f}")
        lines.append(f"| {' | '.join(map(str, row))} |")
        for failure in state["failures"]:
            click.echo(f"FAILED: {name}, case {failure['case']} of seed {seed}: {failure['failure']}", err=True)
        failed = failed or bool(state["failures"])
    click.echo("\n".join(lines))
    if failed:
        raise SystemExit(1)


def run_part(name: str, cases: int, seed: int, output: Path) -> dict[str, Any]:
    """All cases of a part that are not done yet; what is known of all of them."""
    kept = output / f"{name}-{seed}.json"
    state: dict[str, Any] = {"done": 0, "failures": [], "outcomes": {}, "seconds": 0.0}
    if kept.exists():
        state = json.loads(kept.read_text(encoding="utf-8"))
    outcomes = Counter(state["outcomes"])
    with progress_bar(total=cases, initial=min(cases, state["done"]), desc=name, unit="case") as bar:
        while state["done"] < cases:
            begin, first = time.monotonic(), state["done"]
            for result in _results(name, output / name, seed, first, min(cases, first + _AT_ONCE)):
                state["done"] = result["case"] + 1
                if "failure" in result:
                    state["failures"].append(result)
                else:
                    outcomes[result["outcome"]] += 1
                bar.update()
            state["seconds"] += time.monotonic() - begin
            state["outcomes"] = dict(outcomes)
            write_json(kept, state)
    return state


def _results(name: str, folder: Path, seed: int, first: int, last: int) -> list[dict[str, Any]]:
    """What a process says of these cases; if it dies or hangs, the case that it was at is a failure."""
    command = [sys.executable, "-m", "tests.torture.worker", name, str(folder), str(seed), str(first), str(last)]
    results: list[dict[str, Any]] = []
    with (folder.parent / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        while line := _line(process.stdout, _SILENCE):
            results.append(json.loads(line))
        if hangs := line is None:
            process.kill()
        status = process.wait()
    if len(results) < last - first:
        what = f"no word for {_SILENCE} s" if hangs else f"the process ended with {status}"
        results.append({"case": first + len(results), "failure": f"{what}: see {folder.parent / f'{name}.log'}"})
    return results


def _line(stream: Any, seconds: float) -> bytes | None:
    """The next line, nothing at the end of the stream, None if none comes in time."""
    ready, _, _ = select.select([stream], [], [], seconds)
    return bytes(stream.readline()) if ready else None


if __name__ == "__main__":
    main()
