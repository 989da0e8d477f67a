"""Health checks: warnings about a run that goes wrong, for the terminal and metrics.jsonl."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MAX_DUPLICATE_SHARE = 0.3  # share of the images that may get the same caption
MAX_ATTENTION_ENTROPY = 0.998  # relative to uniform attention
ATTENTION_WARMUP_EPOCHS = 3  # epochs before nearly uniform attention is reported
MAX_PERPLEXITY_RATIO = 2.0  # relative to the lowest perplexity so far


def duplicate_share(captions: Iterable[str]) -> float:
    """Return the share of the captions that equal the most common one; 0 if all captions differ."""
    counts = Counter(captions)
    most_common = max(counts.values())
    return most_common / counts.total() if most_common > 1 else 0.0


def attention_entropy(attention: Tensor, mask: Tensor) -> Tensor:
    """Return the entropy of the attention weights relative to uniform attention, summed over tokens.

    Args:
        attention: (..., T, P) float; sums to 1 over the P cells.
        mask: (..., T) bool; False at padding.

    Returns:
        (), a sum to which each token contributes 0 (attention on one cell) to 1 (uniform attention).
    """
    weights = attention.float()
    entropy = torch.special.entr(weights).sum(-1) / math.log(max(2, weights.shape[-1]))
    total: Tensor = (entropy * mask).sum()
    return total


def health_warnings(history: list[dict[str, Any]]) -> list[str]:
    """Return one sentence per problem found in the last epoch.

    Args:
        history: one row per epoch, as returned by `gridcap.train.engine.loop.fit`.
    """
    row, messages = history[-1], []
    if row.get("val_duplicate_share", 0) > MAX_DUPLICATE_SHARE:
        messages.append(
            f"{row['val_duplicate_share']:.0%} of the validation images got the same caption: the decoder hardly uses "
            "the image yet (too few epochs, a learning rate that is too high, or uninformative features)"
        )
    if row["epoch"] >= ATTENTION_WARMUP_EPOCHS and row.get("val_attention_entropy", 0) > MAX_ATTENTION_ENTROPY:
        messages.append("attention is nearly uniform: attention maps will not be informative")
    earlier = [r["val_perplexity"] for r in history[:-1] if r.get("val_perplexity") is not None]
    perplexity = row.get("val_perplexity", 0)
    if perplexity is not None and not math.isfinite(perplexity):
        messages.append("validation perplexity is not finite")
    elif earlier and "reward" not in row and perplexity > MAX_PERPLEXITY_RATIO * min(earlier):
        messages.append(
            f"validation perplexity {perplexity:.1f} is more than {MAX_PERPLEXITY_RATIO:g} times its minimum "
            f"({min(earlier):.1f}): the decoder diverges or overfits"
        )
    return messages
