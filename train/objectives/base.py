"""What training minimizes: the interface, and cross-entropy under teacher forcing."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gridcap.common.config import TrainConfig
from gridcap.train.data.batch import CaptionBatch
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder, Memory
from gridcap.train.decoding.base import token_log_probs
from gridcap.train.objectives.loss import attention_reg, smoothed_cross_entropy

Terms = dict[str, Tensor]


class Objective(Protocol):
    """A loss of a batch.

    It is a sum over words, and not a mean: the sums of all parts and processes are added up and divided by the
    number of words once, so that the split changes nothing.
    """

    def __call__(self, decoder: Decoder, batch: CaptionBatch, epoch: int) -> tuple[Tensor, Terms]:
        """The loss to be differentiated, and sums for the log: "words" of this batch, and of what else there is."""


class CrossEntropy:
    """Every word is predicted from the reference's words before it (teacher forcing), or from some of its own.

    Args:
        settings: label smoothing, scheduled sampling, the decoder's own penalty.
    """

    def __init__(self, settings: TrainConfig) -> None:
        self._settings = settings
        self._penalty = float(getattr(settings.decoder, "attention_reg", 0.0))

    def own_words(self, epoch: int) -> float:
        """The probability that a word is the decoder's own, in an epoch from 0."""
        sampling = self._settings.scheduled_sampling
        return min(sampling.max_prob, sampling.prob_step * (epoch // sampling.step_epochs))

    def __call__(self, decoder: Decoder, batch: CaptionBatch, epoch: int) -> tuple[Tensor, Terms]:
        """As `Objective`; the log has "loss", the cross-entropy without label smoothing and penalty."""
        memory = decoder.encode(batch.grids.float())
        given, targets = batch.tokens[..., :-1], batch.tokens[..., 1:]
        if probability := self.own_words(epoch):
            logits, attention = forward_scheduled_sampling(decoder, memory, given, probability)
            logits = logits.flatten(0, 2).index_select(0, batch.target_index)
        else:
            logits, attention = decoder(memory, given, batch.target_index)
        there = targets.flatten().index_select(0, batch.target_index)
        loss, plain, words = smoothed_cross_entropy(logits, there, self._settings.label_smoothing)
        terms = {"words": words, "loss": plain}
        if self._penalty and attention is not None:
            loss = loss + self._penalty * attention_reg(attention, targets)
        return loss, terms


def forward_scheduled_sampling(
    decoder: Decoder, memory: Memory, tokens: Tensor, probability: float
) -> tuple[Tensor, Tensor | None]:
    """Scheduled sampling (Bengio et al. 2015, arXiv:1506.03099): as the decoder's `forward`, but some of the given
    words are replaced by words drawn from what the decoder predicted in their place.

    Args:
        tokens: (B, K, T) int64.
        probability: of each word after the first.

    Returns:
        logits (B, K, T, V) and attention (B, K, T, P) or None.
    """
    b, k, length = tokens.shape
    state = tuple(part.expand(b, k, *part.shape[2:]) for part in decoder.initial_state(memory))
    logits, looks = [], []
    now = tokens[..., 0]
    for t in range(length):
        predicted, state, attention = decoder.step(now, state, memory)
        logits.append(predicted)
        if attention is not None:
            looks.append(attention)
        if t + 1 < length:
            given = tokens[..., t + 1]
            # A draw, as torch.multinomial makes it, without its checks, for which it waits for the device.
            chances = token_log_probs(predicted.detach()).exp()
            drawn = (chances / torch.empty_like(chances).exponential_()).argmax(-1)
            own = (torch.rand(b, k, device=tokens.device) < probability) & (given != PAD)
            now = torch.where(own, drawn, given)
    return torch.stack(logits, 2), torch.stack(looks, 2) if looks else None
