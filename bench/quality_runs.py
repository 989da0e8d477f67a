"""Settings of the runs that `bench.quality` trains: all recipes with cross-entropy and SCST, and ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    "train.captions_per_image": 5,
    "train.weight_decay": 0.0,
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
POOLED = {**RECURRENT, "train.decoder.normalize_grid": "true"}
IMPROVED = {  # our defaults, which the recipes disable because their papers lack them
    "train.decoder.normalize_grid": "true",
    "train.decoder.project_grid": "true",
    "train.decoder.cell_positions": "true",
    "train.decoder.initial_state": "mean",
    "train.decoder.input_dropout": "null",
}
ATTENTION = {**RECURRENT, **IMPROVED, "train.decoder.attention_size": 96}
SMALL_DECODERS: dict[str, dict[str, Any]] = {  # decoder sizes per recipe
    "lstm-init": POOLED,
    "show-and-tell": POOLED,
    "lstm-inject": POOLED,
    "tutorial-gru": {**ATTENTION, "train.decoder.output_layer": "hidden"},
    "soft-attention": ATTENTION,
    "att2in": {
        **ATTENTION,
        "train.decoder.output_layer": "deep",
    },  # logits computed from the context vector too: converges much faster
    "top-down": {
        **ATTENTION,
        "train.decoder.output_layer": "deep",
        "train.epochs": 16,
    },  # two LSTMs converge more slowly
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
LARGER: dict[
    str, dict[str, Any]
] = {  # one recipe without attention, two with: five times the steps, four times the size
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
SHORTER = tuple(
    recipe for recipe in RECIPES if "train.epochs" in SMALL_DECODERS[recipe]
)  # also trained with the number of epochs of the others
BASE = "att2in"  # recipe for the ablations
ABLATIONS: dict[str, dict[str, Any]] = {
    "hidden output layer": {"train.decoder.output_layer": "hidden"},
    "without label smoothing": {"train.label_smoothing": 0.0},
    "without EMA": {"train.ema_decay": 0.0},
    "with scheduled sampling up to 0.25": {
        "train.scheduled_sampling": "{max_prob: 0.25, prob_step: 0.05, step_epochs: 1}"
    },
    "one caption per image and epoch": {"train.captions_per_image": 1},
}
ABLATION_SEEDS = 2
PUBLISHED = ("--recipe", BASE, "--set", "train.epochs=16")  # the settings of Rennie et al., for comparison


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        row: name of its row in the table.
        seed: random seed.
        arguments: arguments of train-decoder except data, output, and seed.
        source: run whose decoder SCST starts from.
    """

    row: str
    seed: int
    arguments: tuple[str, ...]
    source: Run | None = None

    @property
    def name(self) -> str:
        """Name of the output folder."""
        return f"{self.row.replace(' ', '-')}-{self.seed}"


def plan_runs(recipes: Sequence[str], seeds: int, ablations: bool) -> list[Run]:
    """Return all runs: cross-entropy, then SCST starting from them, then the ablations."""
    small = [
        Run(recipe, seed, ("--recipe", recipe, *_set_flags(SMALL | SMALL_DECODERS[recipe])))
        for seed in range(seeds)
        for recipe in recipes
    ]
    larger = [
        Run(
            f"{recipe}, larger",
            seed,
            ("--recipe", recipe, *_set_flags(SMALL | SMALL_DECODERS[recipe] | LARGER[recipe])),
        )
        for seed in range(seeds)
        for recipe in recipes
        if recipe in LARGER
    ]
    runs = small + larger
    runs += [Run(f"{run.row} + SCST", run.seed, ("--scst", *_set_flags(SCST)), run) for run in (*small, *larger)]
    epochs = SMALL["train.epochs"]
    runs += [
        Run(
            f"{recipe}, {epochs} epochs",
            seed,
            ("--recipe", recipe, *_set_flags(SMALL | SMALL_DECODERS[recipe] | {"train.epochs": epochs})),
        )
        for seed in range(seeds)
        for recipe in recipes
        if recipe in SHORTER
    ]
    if BASE in recipes:
        runs.append(Run(f"{BASE}, as published", 0, (*PUBLISHED, *_set_flags(IMPROVED))))
        runs += [Run(f"{BASE}, reference implementation", seed, PUBLISHED) for seed in range(seeds)]
    for seed in range(min(seeds, ABLATION_SEEDS) if ablations else 0):
        for text, change in ABLATIONS.items():
            settings = SMALL | SMALL_DECODERS[BASE] | change
            runs.append(Run(f"{BASE}, {text}", seed, ("--recipe", BASE, *_set_flags(settings))))
    return runs


def _set_flags(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(part for key, value in values.items() for part in ("--set", f"{key}={value}"))
