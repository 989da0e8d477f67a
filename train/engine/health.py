"""Signs that a run goes wrong, for the screen and metrics.jsonl."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_MOST_ALIKE = 0.3  # share of the images that may get one and the same caption
_UNIFORM = 0.998  # of the entropy that looks have when they go everywhere alike
_SETTLED = 3  # epochs after which attention should have found something
_DIVERGED = 2.0  # times the lowest perplexity so far


def most_common_share(captions: Iterable[str]) -> float:
    """How large a share of the captions are the one that is most frequent; 0 when no two are alike."""
    counts = Counter(captions)
    most = max(counts.values())
    return most / counts.total() if most > 1 else 0.0


def attention_spread(attention: Tensor, there: Tensor) -> Tensor:
    """Entropy of the looks, relative to looks that go everywhere alike; summed over the words.

    Args:
        attention: (..., T, P), sums to 1 over the cells.
        there: (..., T) bool, which of the words there are.

    Returns:
        A sum in which a word counts 0 (one cell) to 1 (all cells alike).
    """
    share = attention.float()
    entropy = torch.special.entr(share).sum(-1) / math.log(max(2, share.shape[-1]))
    total: Tensor = (entropy * there).sum()
    return total


def warnings(history: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the last epoch, a sentence each.

    Args:
        history: rows of the epochs as `train.loop.fit` makes them.
    """
    row, found = history[-1], []
    if row.get("val_commonest", 0) > _MOST_ALIKE:
        found.append(
            f"{row['val_commonest']:.0%} of the validation images got one and the same caption: the decoder hardly "
            "uses the image yet (too few epochs, a learning rate that is too high, or features that say too little)"
        )
    if row["epoch"] >= _SETTLED and row.get("val_attention_spread", 0) > _UNIFORM:
        found.append("attention looks everywhere alike: pictures of it will show nothing")
    earlier = [r["val_perplexity"] for r in history[:-1] if r.get("val_perplexity") is not None]
    now = row.get("val_perplexity", 0)
    if now is not None and not math.isfinite(now):
        found.append("validation perplexity is not finite")
    elif earlier and "reward" not in row and now > _DIVERGED * min(earlier):
        found.append(
            f"validation perplexity {now:.1f} has grown to more than {_DIVERGED:g} times its lowest "
            f"({min(earlier):.1f}): the decoder forgets, or learns the training captions by heart"
        )
    return found
