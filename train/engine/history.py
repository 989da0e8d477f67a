"""The rows of a run's epochs: how many are done, which is the best, and a line for the screen."""

from __future__ import annotations

from gridcap.train.engine.log import Row


def epochs_done(history: list[Row]) -> int:
    """How many epochs are done; the look at what a run began with is epoch 0."""
    return int(history[-1]["epoch"]) if history else 0


def best_row(history: list[Row]) -> Row:
    """The epoch with the highest validation CIDEr, of equals the one with the lowest validation loss; without any
    validation the last."""
    validated = [row for row in history if "val_cider" in row]
    return max(validated, key=lambda row: (row["val_cider"], -row["val_loss"])) if validated else history[-1]


def last_line(history: list[Row], epochs: int) -> str:
    """The last epoch in words, of `epochs` in all."""
    row = history[-1]
    text = f"epoch {row['epoch']:3d}/{epochs}"
    if row["epoch"] == 0:
        text += "  as it begins"
    if "train_loss" in row:
        text += f"  loss {row['train_loss']:.3f}"
    if "reward" in row:
        text += f"  reward {row['reward']:.3f}, baseline {row['baseline']:.3f}, advantage {row['advantage']:.3f}"
    if "val_cider" in row:
        text += f"  validation: loss {row['val_loss']:.3f}, perplexity {row['val_perplexity']:.2f}"
        text += f", greedy CIDEr {row['val_cider']:.3f}"
        if history[0]["epoch"] == 0 and row["epoch"] and row["val_cider"] < history[0]["val_cider"]:
            text += f" (below the {history[0]['val_cider']:.3f} it began with)"
        elif best_row(history) is row:
            text += " (best so far)"
    return f"{text}  {row['seconds']:.1f} s" if "seconds" in row else text
