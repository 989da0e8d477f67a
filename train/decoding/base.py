"""Shared pieces of all decoding methods: the hypothesis and the token distribution.

Beam search, sampling, and SCST read the decoder's logits through the functions of this module, so a log-probability
means the same everywhere. Decoding uses `torch.no_grad`, not inference mode: in inference mode, autocast does not
cache its casts of the weights and repeats them at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gridcap.train.data.vocabulary import BOS, PAD, UNK

NEVER_GENERATED = (UNK,)  # in addition to PAD and BOS, which have no meaning within a caption


@dataclass(frozen=True)
class Hypothesis:
    """A decoded caption.

    Attributes:
        tokens: T token ids, without BOS and EOS.
        log_prob: natural log-probability under `token_log_probs`, including EOS unless the caption was cut.
            Temperature, top-k, top-p, and trigram blocking do not affect it.
        attention: (T, P) float32 attention weights of each token; None for a decoder without attention.
    """

    tokens: list[int]
    log_prob: float
    attention: np.ndarray | None


def mask_forbidden(logits: Tensor, forbidden: Sequence[int] = NEVER_GENERATED) -> Tensor:
    """Return a float32 copy of the logits with PAD, BOS, and the forbidden tokens set to -inf.

    Args:
        logits: (..., V).
        forbidden: ids of further tokens that must not be generated.

    Returns:
        (..., V) float32; differentiable.
    """
    masked = logits.to(torch.float32, copy=True)
    for token in (PAD, BOS, *forbidden):
        masked[..., token] = -torch.inf
    return masked


def token_log_probs(logits: Tensor, forbidden: Sequence[int] = NEVER_GENERATED) -> Tensor:
    """Return the log-probabilities used for decoding: the softmax over all tokens except PAD, BOS, and forbidden ones.

    The excluded tokens have log-probability -inf. Code that gathers them (for padding) must replace the result with
    `masked_fill`, because -inf * 0 is NaN.

    Args:
        logits: (..., V), not modified.
        forbidden: ids of further tokens that must not be generated.

    Returns:
        (..., V) float32; differentiable.
    """
    return mask_forbidden(logits, forbidden).log_softmax(-1)
