"""What every recipe reaches on a small data set of real photographs, and what each ingredient is worth.

    python -m bench.quality --features features/ --annotations captions/ --output results/

Needs stores train.h5, val.h5, test.h5 and captions_train.json, captions_val.json, captions_test.json of a data set
that is small: some thousand photographs. Every recipe is trained with several seeds, with cross-entropy and then
self-critically; the checkpoint is chosen on val, and test is looked at once, at the end. The recipes' sizes are
those for COCO; SMALL makes them fit a few thousand images and a CPU, alike for all. Finished runs are kept: the same
command goes on where it was stopped.
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

from common.files import write_json, write_text

RECIPES = (
    "lstm-init", "show-and-tell", "lstm-inject", "tutorial-gru", "soft-attention", "att2in", "top-down", "transformer",
)  # fmt: skip
SMALL = {
    "train.max_length": 20, "train.epochs": 12, "train.batch_size": 32, "train.vocabulary.max_size": "null",
    "train.vocabulary.min_count": 3, "train.decoder.embed_size": 256, "train.decoder.dropout": 0.5,
    "train.optimizer": "adam", "train.learning_rate": 1e-3, "train.clip_norm": 5.0, "train.clip_value": "null",
    "train.schedule": "{kind: cosine}", "train.label_smoothing": 0.1, "train.ema": 0.99,
    "train.scheduled_sampling": "{max: 0.0}",
}  # fmt: skip
RECURRENT = {"train.decoder.hidden_size": 256}
ATTENTION = {**RECURRENT, "train.decoder.attention_size": 128}
TRANSFORMER = {"train.decoder.layers": 2, "train.decoder.feedforward_size": 512, "train.decoder.dropout": 0.3}
SCST = {
    "train.epochs": 6,
    "train.learning_rate": 1e-4,
    "train.ema": 0.99,
    "train.clip_value": "null",
    "train.clip_norm": 5.0,
}
BASE = "att2in"  # the one that ingredients are taken from or added to
INGREDIENTS: dict[str, dict[str, Any]] = {
    "without label smoothing": {"train.label_smoothing": 0.0},
    "without weight averaging": {"train.ema": 0.0},
    "with scheduled sampling to 0.25": {"train.scheduled_sampling": "{max: 0.25, increase: 0.05, every: 2}"},
    "one caption an image and pass": {"train.captions_per_image": 1},
    "dropout 0.3 instead of 0.5": {"train.decoder.dropout": 0.3},
    "constant learning rate": {"train.schedule": "{kind: constant}"},
}
METRICS = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "perplexity")


@dataclass(frozen=True)
class Trained:
    """One run and how it is made.

    Attributes:
        row: its name in the table.
        seed: of the run.
        arguments: of train-decoder, beside data, output and seed.
        source: the run it goes on from, for self-critical training.
    """

    row: str
    seed: int
    arguments: tuple[str, ...]
    source: Trained | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.row.replace(' ', '-')}-{self.seed}"


def sizes(recipe: str) -> dict[str, Any]:
    """The small sizes of a recipe's decoder."""
    if recipe == "transformer":
        return TRANSFORMER
    return RECURRENT if recipe in ("lstm-init", "show-and-tell", "lstm-inject") else ATTENTION


def plan(recipes: Sequence[str], seeds: int, ingredients: bool) -> list[Trained]:
    """Every run, cross-entropy before what goes on from it."""
    runs = []
    for seed in range(seeds):
        for recipe in recipes:
            first = Trained(recipe, seed, ("--recipe", recipe, *_sets(SMALL | sizes(recipe))))
            runs += [first, Trained(f"{recipe} + SCST", seed, ("--scst", *_sets(SCST)), first)]
        if ingredients:
            for text, change in INGREDIENTS.items():
                settings = SMALL | sizes(BASE) | change
                runs.append(Trained(f"{BASE}, {text}", seed, ("--recipe", BASE, *_sets(settings))))
    return runs


def _sets(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(part for key, value in values.items() for part in ("--set", f"{key}={value}"))


class Quality:
    """Trains and evaluates runs, each in processes of its own with a thread or several.

    Args:
        features, annotations: folders of the stores and the captions files.
        output: folder of the results.
        threads: of each process.
    """

    def __init__(self, features: Path, annotations: Path, output: Path, threads: int) -> None:
        self._features, self._annotations, self._output = features, annotations, output
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._ended: dict[str, threading.Event] = {}

    def run(self, runs: Sequence[Trained], jobs: int) -> None:
        """Do all that is not done yet, `jobs` at a time."""
        self._ended = {run.name: threading.Event() for run in runs}
        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(self._one, run) for run in runs]:
                done.result()

    def _one(self, run: Trained) -> None:
        try:
            if run.source is not None and run.source.name in self._ended:  # else it was there before
                self._ended[run.source.name].wait()
            folder = self._output / "runs" / run.name
            if not (folder / "curves.png").exists():
                source = () if run.source is None else ("--init-from", str(self._output / "runs" / run.source.name))
                resume = ("--resume",) if (folder / "config.yaml").exists() else ()
                self._command(
                    "train_decoder", "train.cli", folder,
                    *self._data("train", ""), *self._data("val", "val-"), "--output", str(folder),
                    "--seed", str(run.seed), *run.arguments, *source, *resume,
                )  # fmt: skip
            for beams in (1, 3):
                result = folder / f"test-beam-{beams}.json"
                if not result.exists():
                    self._command(
                        "evaluate_decoder", "train.evaluate_cli", folder, "--checkpoint", str(folder),
                        *self._data("test", ""), "--beam-size", str(beams), "--output", str(result),
                    )  # fmt: skip
            click.echo(
                f"{run.name}: " + ", ".join(f"beam {b}: CIDEr {self.score(run, b)['CIDEr']:.3f}" for b in (1, 3))
            )
        finally:
            self._ended[run.name].set()

    def _data(self, split: str, prefix: str) -> tuple[str, ...]:
        return (
            f"--{prefix}features", str(self._features / f"{split}.h5"),
            f"--{prefix}annotations", str(self._annotations / f"captions_{split}.json"),
        )  # fmt: skip

    def _command(self, function: str, module: str, folder: Path, *arguments: str) -> None:
        code = f"from {module} import {function}; {function}()"
        log = self._output / "logs" / f"{folder.name}.{function}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], env=self._environment, stdout=file, stderr=file, check=False
            )
        if done.returncode:
            raise click.ClickException(f"{' '.join(arguments)}: ended with {done.returncode}, see {log}")

    def score(self, run: Trained, beams: int) -> dict[str, float]:
        """A finished run's metrics on test."""
        path = self._output / "runs" / run.name / f"test-beam-{beams}.json"
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return found

    def is_done(self, run: Trained) -> bool:
        """Whether all of its results are there."""
        return all((self._output / "runs" / run.name / f"test-beam-{b}.json").exists() for b in (1, 3))


def table(quality: Quality, runs: Sequence[Trained]) -> tuple[str, list[dict[str, Any]]]:
    """Mean and standard deviation over the seeds, as Markdown and as data."""
    lines = ["| recipe | seeds | CIDEr, greedy | CIDEr, beam 3 | BLEU-4, beam 3 | METEOR | ROUGE-L | perplexity |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in dict.fromkeys(run.row for run in runs):
        done = [run for run in runs if run.row == name and quality.is_done(run)]
        if not done:
            continue
        found = {b: [quality.score(run, b) for run in done] for b in (1, 3)}
        cells = []
        for beams, metric, scale in (
            (1, "CIDEr", 100), (3, "CIDEr", 100), (3, "BLEU-4", 100), (3, "METEOR", 100), (3, "ROUGE-L", 100),
            (3, "perplexity", 1),
        ):  # fmt: skip
            values = [score[metric] * scale for score in found[beams] if metric in score]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {name} | {len(done)} | " + " | ".join(cells) + " |")
        rows.append({"recipe": name, "seeds": [run.seed for run in done], "beam": found})
    return "\n".join(lines) + "\n", rows


@click.command()
@click.option("--features", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of the stores.")
@click.option("--annotations", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of captions.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for runs and results.")
@click.option("--recipe", "recipes", multiple=True, type=click.Choice(RECIPES), help="Only these  [default: all]")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each recipe.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, help="Processes at a time, a core each.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each process.")
@click.option("--ingredients/--no-ingredients", default=True, show_default=True, help="The ablations too.")
def main(
    features: Path, annotations: Path, output: Path, recipes: tuple[str, ...], seeds: int, jobs: int, threads: int,
    ingredients: bool,
) -> None:  # fmt: skip
    """Train and evaluate every recipe; print the table that stands in docs/recipes.md."""
    runs = plan(recipes or RECIPES, seeds, ingredients)
    quality = Quality(features, annotations, output, threads)
    quality.run([run for run in runs if not quality.is_done(run)], jobs)
    text, rows = table(quality, runs)
    write_text(output / "quality.md", text)
    write_json(output / "quality.json", {"machine": platform.platform(), "cores": os.cpu_count(), "rows": rows})
    click.echo(text)


if __name__ == "__main__":
    main()
