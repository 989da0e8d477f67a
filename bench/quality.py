"""Quality of all recipes on a small dataset of real photos, and ablations.

    python -m bench.quality --features features/ --annotations captions/ --output results/

Requires the stores train.h5, val.h5, test.h5 and the captions files captions_train.json, captions_val.json,
captions_test.json of a dataset with a few thousand photos. Every recipe is trained with several seeds, first with
cross-entropy and then with SCST. The checkpoint is selected on val, and test is evaluated once at the end. The recipes
have the sizes for COCO; SMALL (in quality_runs.py) adapts all of them in the same way to a few thousand images and a
CPU. Scores are stored in a file; rerun the command to resume.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from bench.measure import processor_name
from bench.quality_runs import RECIPES, Run, plan_runs
from gridcap.common.files import write_json

DECODINGS = {  # options of evaluate-decoder for the test images
    "1": ("--beam-size", "1"),
    "3": ("--beam-size", "3"),
    "mbr": ("--beam-size", "15", "--mbr"),
}
RESULTS = Path("bench/results/quality.json")


@dataclass(frozen=True)
class Folders:
    """Input and output paths.

    Attributes:
        features: folder of the feature stores.
        annotations: folder of the captions files.
        output: folder of the runs.
        results: JSON file of the scores. Runs stored there with the same arguments are not trained again.
    """

    features: Path
    annotations: Path
    output: Path
    results: Path


class Quality:
    """Train and evaluate runs in separate processes and store their scores in a file.

    Args:
        folders: input and output paths.
        threads: number of threads per process.
    """

    def __init__(self, folders: Folders, threads: int) -> None:
        self._folders = folders
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._finished: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self.scores: dict[str, dict[str, Any]] = {}
        if folders.results.exists():
            self.scores = json.loads(folders.results.read_text(encoding="utf-8"))["runs"]

    def scores_of(self, run: Run) -> dict[str, dict[str, float]]:
        """Return the stored scores of a run by decoding; empty if they are for other arguments."""
        stored = self.scores.get(run.name, {})
        return stored["metrics"] if stored.get("arguments") == [*run.arguments] else {}

    def is_done(self, run: Run) -> bool:
        """Return whether all scores are stored; a missing decoding counts only if the decoder still exists."""
        stored = set(self.scores_of(run))
        return stored >= set(DECODINGS) or (bool(stored) and not self._is_trained(run))

    def run(self, runs: Sequence[Run], jobs: int) -> None:
        """Run everything that is not done yet, `jobs` runs at a time, and retrain missing sources of SCST runs."""
        needed = {run.source for run in runs if run.source is not None and not self.is_done(run)}
        todo = [run for run in runs if not self.is_done(run) or (run in needed and not self._is_trained(run))]
        self._finished = {run.name: threading.Event() for run in todo}
        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(self._train_and_evaluate, run) for run in todo]:
                done.result()

    def _is_trained(self, run: Run) -> bool:
        folder = self._folders.output / run.name
        if not (folder / "metrics.jsonl").exists():
            return False
        epochs = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["train"]["epochs"]
        rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return bool(rows) and json.loads(rows[-1])["epoch"] == epochs

    def _train_and_evaluate(self, run: Run) -> None:
        try:
            if run.source is not None and run.source.name in self._finished:  # otherwise it was trained before
                self._finished[run.source.name].wait()
            folder = self._folders.output / run.name
            if not self._is_trained(run):
                source = () if run.source is None else ("--init-from", str(self._folders.output / run.source.name))
                resume = ("--resume",) if (folder / "config.yaml").exists() else ()
                self._command(
                    "train_decoder",
                    "gridcap.train.cli",
                    run,
                    *self._data("train", ""),
                    *self._data("val", "val-"),
                    "--output",
                    str(folder),
                    "--seed",
                    str(run.seed),
                    *run.arguments,
                    *source,
                    *resume,
                )
            scores = {name: self._evaluate(run, name) for name in DECODINGS}
            with self._lock:
                machine = {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()}
                self.scores[run.name] = {
                    "row": run.row,
                    "seed": run.seed,
                    "arguments": [*run.arguments],
                    "machine": machine,
                    "metrics": scores,
                }
                self._folders.results.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._folders.results, {"runs": self.scores})
            click.echo(f"{run.name}: " + ", ".join(f"{name}: CIDEr {scores[name]['CIDEr']:.3f}" for name in DECODINGS))
        finally:
            self._finished[run.name].set()

    def _evaluate(self, run: Run, decoding: str) -> dict[str, float]:
        folder = self._folders.output / run.name
        result = folder / f"test-{decoding}.json"
        if not result.exists():
            self._command(
                "evaluate_decoder",
                "gridcap.train.evaluate_cli",
                run,
                "--checkpoint",
                str(folder),
                *self._data("test", ""),
                *DECODINGS[decoding],
                "--output",
                str(result),
            )
        metrics: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))["metrics"]
        return metrics

    def _data(self, split: str, prefix: str) -> tuple[str, ...]:
        return (
            f"--{prefix}features",
            str(self._folders.features / f"{split}.h5"),
            f"--{prefix}annotations",
            str(self._folders.annotations / f"captions_{split}.json"),
        )

    def _command(self, function: str, module: str, run: Run, *arguments: str) -> None:
        code = f"from {module} import {function}; {function}()"
        log = self._folders.output / "logs" / f"{run.name}.{function}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], env=self._environment, stdout=file, stderr=file, check=False
            )
        if done.returncode:
            raise click.ClickException(f"{' '.join(arguments)}: exit status {done.returncode}, see {log}")


def make_table(quality: Quality, runs: Sequence[Run]) -> str:
    """Return mean and standard deviation over the seeds as a Markdown table; perplexity is unscaled, others are x100.

    A number in parentheses is the number of seeds with that score if some lack it.
    """
    lines = [
        "| recipe | seeds | CIDEr, greedy | CIDEr, beam 3 | CIDEr, MBR of 15 | BLEU-4, beam 3 | METEOR | ROUGE-L "
        "| perplexity |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(run.row for run in runs):
        stored = [scores for run in runs if run.row == name and (scores := quality.scores_of(run))]
        if not stored:
            continue
        cells = []
        for decoding, metric, scale in (
            ("1", "CIDEr", 100),
            ("3", "CIDEr", 100),
            ("mbr", "CIDEr", 100),
            ("3", "BLEU-4", 100),
            ("3", "METEOR", 100),
            ("3", "ROUGE-L", 100),
            ("3", "perplexity", 1),
        ):
            values = [scores[decoding][metric] * scale for scores in stored if metric in scores.get(decoding, {})]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            fewer = f" ({len(values)})" if len(values) < len(stored) else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}{fewer}" if values else "")
        lines.append(f"| {name} | {len(stored)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option(
    "--features", type=click.Path(path_type=Path, exists=True), required=True, help="folder of the feature stores"
)
@click.option(
    "--annotations", type=click.Path(path_type=Path, exists=True), required=True, help="folder of the captions files"
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="output folder of the runs")
@click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="JSON file of the scores"
)
@click.option("--recipe", "recipes", multiple=True, type=click.Choice(RECIPES), help="recipe to run  [default: all]")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="number of seeds per recipe")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, help="number of concurrent runs")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="threads per run")
@click.option("--ablations/--no-ablations", default=True, show_default=True, help="run the ablations")
def main(recipes: tuple[str, ...], seeds: int, jobs: int, threads: int, ablations: bool, **paths: Path) -> None:
    """Train and evaluate every recipe; print the table in docs/recipes.md."""
    runs = plan_runs(recipes or RECIPES, seeds, ablations)
    quality = Quality(Folders(**paths), threads)
    quality.run(runs, jobs)
    click.echo(make_table(quality, runs))


if __name__ == "__main__":
    main()
