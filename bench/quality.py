"""What every recipe reaches on a small data set of real photos, and what each ingredient is worth.

    python -m bench.quality --features features/ --annotations captions/ --output results/

Needs stores train.h5, val.h5, test.h5 and captions_train.json, captions_val.json, captions_test.json of a data set
that is small: some thousand photos. Every recipe is trained with several seeds, with cross-entropy and then
self-critically; the checkpoint is chosen on val, and test is looked at once, at the end. The recipes' sizes are
those for COCO; SMALL makes them fit a few thousand images and a CPU, alike for all. Scores are kept in a file: the
same command goes on where it was stopped.
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

from bench.measure import processor
from gridcap.common.files import write_json

RECIPES = (
    "lstm-init",
    "show-and-tell",
    "lstm-inject",
    "tutorial-gru",
    "soft-attention",
    "att2in",
    "top-down",
    "transformer",
)
SMALL = {
    "train.max_length": 16,
    "train.epochs": 8,
    "train.batch_size": 32,
    "train.vocabulary.max_size": "null",
    "train.vocabulary.min_count": 3,
    "train.decoder.embed_size": 256,
    "train.decoder.dropout": 0.3,
    "train.optimizer": "adam",
    "train.learning_rate": 2e-3,
    "train.max_grad_norm": 5.0,
    "train.max_grad_value": "null",
    "train.schedule": "{kind: cosine, warmup_steps: 50}",
    "train.label_smoothing": 0.1,
    "train.ema_decay": 0.99,
    "train.scheduled_sampling": "{max_prob: 0.0}",
}
RECURRENT = {"train.decoder.hidden_size": 256}
ATTENTION = {**RECURRENT, "train.decoder.attention_size": 96}
OWN: dict[str, dict[str, Any]] = {  # what the small size of each recipe's decoder is
    "lstm-init": RECURRENT,
    "show-and-tell": RECURRENT,
    "lstm-inject": RECURRENT,
    "tutorial-gru": ATTENTION,
    "soft-attention": ATTENTION,
    "att2in": {
        **ATTENTION,
        "train.decoder.output_layer": "deep",
    },  # words straight from the context: learns much sooner
    "top-down": {**ATTENTION, "train.decoder.output_layer": "deep", "train.epochs": 16},  # two LSTMs learn more slowly
    "transformer": {
        "train.decoder.layers": 2,
        "train.decoder.feedforward_size": 512,
        "train.learning_rate": 1e-3,
    },
}
LONGER = {
    "train.epochs": 12,
    "train.batch_size": 10,
    "train.learning_rate": 7e-4,
    "train.ema_decay": 0.995,
    "train.decoder.embed_size": 512,
    "train.decoder.hidden_size": 512,
    "train.decoder.dropout": 0.5,
}
LARGER: dict[str, dict[str, Any]] = {  # one without attention, two with: five times the steps, four times the size
    "lstm-inject": LONGER,
    "att2in": {**LONGER, "train.decoder.attention_size": 256},
    "top-down": {**LONGER, "train.decoder.attention_size": 256, "train.epochs": 16},
}
SCST = {
    "train.epochs": 6,
    "train.learning_rate": 4e-4,
    "train.schedule": "{kind: cosine}",
    "train.ema_decay": 0.99,
    "train.max_grad_value": "null",
    "train.max_grad_norm": 5.0,
    "train.scst.temperature": 0.5,
}
SHORTER = tuple(recipe for recipe in RECIPES if "train.epochs" in OWN[recipe])  # also with the epochs of the others
BASE = "att2in"  # the one that ingredients are taken from or added to
INGREDIENTS: dict[str, dict[str, Any]] = {
    "words from the state alone": {"train.decoder.output_layer": "hidden"},
    "without label smoothing": {"train.label_smoothing": 0.0},
    "without weight averaging": {"train.ema_decay": 0.0},
    "with scheduled sampling to 0.25": {
        "train.scheduled_sampling": "{max_prob: 0.25, prob_step: 0.05, step_epochs: 1}"
    },
    "one caption an image and pass": {"train.captions_per_image": 1},
}
INGREDIENT_SEEDS = 2
# For comparison: the recipe as it stands, that is Rennie et al.'s settings, with our decoder and with the known one.
PUBLISHED = (
    "--recipe",
    BASE,
    "--set",
    "train.epochs=16",
    "--set",
    "train.batch_size=10",
    "--set",
    "train.max_length=16",
)
SEARCHES = {  # how the test images are captioned
    "1": ("--beam-size", "1"),
    "3": ("--beam-size", "3"),
    "consensus": ("--beam-size", "15", "--mbr"),
}
RESULTS = Path("bench/results/quality.json")


@dataclass(frozen=True)
class Trained:
    """One run and how it is made.

    Attributes:
        row: its name in the table.
        seed: of the run.
        arguments: of train-decoder, beside data, output and seed.
        source: the run it goes on from, for self-critical training.
        known: with the decoder of `bench.known` in place of ours.
    """

    row: str
    seed: int
    arguments: tuple[str, ...]
    source: Trained | None = None
    known: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.row.replace(' ', '-')}-{self.seed}"


def plan(recipes: Sequence[str], seeds: int, ingredients: bool) -> list[Trained]:
    """Every run: all with cross-entropy, then what goes on from them, then the ingredients."""
    small = [
        Trained(recipe, seed, ("--recipe", recipe, *_sets(SMALL | OWN[recipe])))
        for seed in range(seeds)
        for recipe in recipes
    ]
    larger = [
        Trained(f"{recipe}, larger", seed, ("--recipe", recipe, *_sets(SMALL | OWN[recipe] | LARGER[recipe])))
        for seed in range(seeds)
        for recipe in recipes
        if recipe in LARGER
    ]
    runs = small + larger
    runs += [Trained(f"{run.row} + SCST", run.seed, ("--scst", *_sets(SCST)), run) for run in (*small, *larger)]
    epochs = SMALL["train.epochs"]
    runs += [
        Trained(
            f"{recipe}, {epochs} epochs",
            seed,
            ("--recipe", recipe, *_sets(SMALL | OWN[recipe] | {"train.epochs": epochs})),
        )
        for seed in range(seeds)
        for recipe in recipes
        if recipe in SHORTER
    ]
    if BASE in recipes:
        runs.append(Trained(f"{BASE}, as published", 0, PUBLISHED))
        runs += [Trained(f"{BASE}, as known", seed, PUBLISHED, known=True) for seed in range(seeds)]
    for seed in range(min(seeds, INGREDIENT_SEEDS) if ingredients else 0):
        for text, change in INGREDIENTS.items():
            settings = SMALL | OWN[BASE] | change
            runs.append(Trained(f"{BASE}, {text}", seed, ("--recipe", BASE, *_sets(settings))))
    return runs


def _sets(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(part for key, value in values.items() for part in ("--set", f"{key}={value}"))


class Quality:
    """Trains and evaluates runs, each in processes of its own, and keeps their scores in a file.

    Args:
        features, annotations: folders of the stores and the captions files.
        output: folder of the runs.
        results: JSON file with the scores; runs that stand in it with the same arguments are not trained again.
        threads: of each process.
    """

    def __init__(self, features: Path, annotations: Path, output: Path, results: Path, threads: int) -> None:
        self._features, self._annotations, self._output, self._results = features, annotations, output, results
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._ended: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self.scores: dict[str, dict[str, Any]] = {}
        if results.exists():
            self.scores = json.loads(results.read_text(encoding="utf-8"))["runs"]

    def found(self, run: Trained) -> dict[str, dict[str, float]]:
        """The scores of it that are there, by the name of the search; of other arguments none."""
        kept = self.scores.get(run.name, {})
        return kept["beam"] if kept.get("arguments") == [*run.arguments] else {}

    def is_done(self, run: Trained) -> bool:
        """Whether its scores are there; those of a new search are wanted only of what is still in its folder."""
        found = set(self.found(run))
        return found >= set(SEARCHES) or (bool(found) and not self._is_trained(run))

    def run(self, runs: Sequence[Trained], jobs: int) -> None:
        """Do all that is not done yet, `jobs` at a time; a run that others go on from must be in its folder."""
        needed = {run.source for run in runs if run.source is not None and not self.is_done(run)}
        todo = [run for run in runs if not self.is_done(run) or (run in needed and not self._is_trained(run))]
        self._ended = {run.name: threading.Event() for run in todo}
        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(self._one, run) for run in todo]:
                done.result()

    def _is_trained(self, run: Trained) -> bool:
        folder = self._output / run.name
        if not (folder / "metrics.jsonl").exists():
            return False
        epochs = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["train"]["epochs"]
        rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return bool(rows) and json.loads(rows[-1])["epoch"] == epochs

    def _one(self, run: Trained) -> None:
        try:
            if run.source is not None and run.source.name in self._ended:  # else it was there before
                self._ended[run.source.name].wait()
            folder = self._output / run.name
            if not self._is_trained(run):
                source = () if run.source is None else ("--init-from", str(self._output / run.source.name))
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
            scores = {name: self._evaluate(run, name) for name in SEARCHES}
            with self._lock:
                machine = {"platform": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
                self.scores[run.name] = {
                    "row": run.row,
                    "seed": run.seed,
                    "arguments": [*run.arguments],
                    "machine": machine,
                    "beam": scores,
                }
                self._results.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._results, {"runs": self.scores})
            click.echo(f"{run.name}: " + ", ".join(f"{name}: CIDEr {scores[name]['CIDEr']:.3f}" for name in SEARCHES))
        finally:
            self._ended[run.name].set()

    def _evaluate(self, run: Trained, search: str) -> dict[str, float]:
        folder = self._output / run.name
        result = folder / f"test-{search}.json"
        if not result.exists():
            self._command(
                "evaluate_decoder",
                "gridcap.train.evaluate_cli",
                run,
                "--checkpoint",
                str(folder),
                *self._data("test", ""),
                *SEARCHES[search],
                "--output",
                str(result),
            )
        found: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))["metrics"]
        return found

    def _data(self, split: str, prefix: str) -> tuple[str, ...]:
        return (
            f"--{prefix}features",
            str(self._features / f"{split}.h5"),
            f"--{prefix}annotations",
            str(self._annotations / f"captions_{split}.json"),
        )

    def _command(self, function: str, module: str, run: Trained, *arguments: str) -> None:
        code = f"from {module} import {function}; {function}()"
        if run.known:
            code = f"from bench.known import stand_in; stand_in(); {code}"
        log = self._output / "logs" / f"{run.name}.{function}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], env=self._environment, stdout=file, stderr=file, check=False
            )
        if done.returncode:
            raise click.ClickException(f"{' '.join(arguments)}: ended with {done.returncode}, see {log}")


def table(quality: Quality, runs: Sequence[Trained]) -> str:
    """Mean and standard deviation over the seeds, as Markdown; CIDEr, BLEU, METEOR and ROUGE times 100.

    A number in parentheses says of how many seeds a score is, where not all have it.
    """
    lines = [
        "| recipe | seeds | CIDEr, greedy | CIDEr, beam 3 | CIDEr, consensus of 15 | BLEU-4, beam 3 | METEOR | ROUGE-L "
        "| perplexity |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(run.row for run in runs):
        found = [scores for run in runs if run.row == name and (scores := quality.found(run))]
        if not found:
            continue
        cells = []
        for search, metric, scale in (
            ("1", "CIDEr", 100),
            ("3", "CIDEr", 100),
            ("consensus", "CIDEr", 100),
            ("3", "BLEU-4", 100),
            ("3", "METEOR", 100),
            ("3", "ROUGE-L", 100),
            ("3", "perplexity", 1),
        ):
            values = [scores[search][metric] * scale for scores in found if metric in scores.get(search, {})]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            fewer = f" ({len(values)})" if len(values) < len(found) else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}{fewer}" if values else "")
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--features", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of the stores.")
@click.option("--annotations", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of captions.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="Scores, JSON.")
@click.option("--recipe", "recipes", multiple=True, type=click.Choice(RECIPES), help="Only these  [default: all]")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each recipe.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, help="Runs at a time, a core each.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each run.")
@click.option("--ingredients/--no-ingredients", default=True, show_default=True, help="The ablations too.")
def main(
    features: Path,
    annotations: Path,
    output: Path,
    results: Path,
    recipes: tuple[str, ...],
    seeds: int,
    jobs: int,
    threads: int,
    ingredients: bool,
) -> None:
    """Train and evaluate every recipe; print the table that stands in docs/recipes.md."""
    runs = plan(recipes or RECIPES, seeds, ingredients)
    quality = Quality(features, annotations, output, results, threads)
    quality.run(runs, jobs)
    click.echo(table(quality, runs))


if __name__ == "__main__":
    main()
