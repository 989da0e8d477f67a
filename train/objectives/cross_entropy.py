"""Cross-entropy with teacher forcing or scheduled sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from gridcap.common.config import TrainConfig
from gridcap.train.data.batch import CaptionBatch
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder, Memory
from gridcap.train.decoding.base import token_log_probs
from gridcap.train.objectives.base import Terms
from gridcap.train.objectives.loss import attention_reg, smoothed_cross_entropy


class CrossEntropy:
    """Cross-entropy of each reference token given the preceding ones.

    Args:
        settings: label smoothing, scheduled sampling, and the attention regularization of the decoder.
    """

    term_names: tuple[str, ...] = ("tokens", "loss")
    capturable = True

    def __init__(self, settings: TrainConfig) -> None:
        self._settings = settings
        self._attention_reg = float(getattr(settings.decoder, "attention_reg", 0.0))

    def sampling_prob(self, epoch: int) -> float:
        """Return the scheduled sampling probability of an epoch (from 0)."""
        sampling = self._settings.scheduled_sampling
        return min(sampling.max_prob, sampling.prob_step * (epoch // sampling.step_epochs))

    def variant(self, epoch: int) -> float:
        """Return the scheduled sampling probability."""
        return self.sampling_prob(epoch)

    def __call__(self, decoder: Decoder, batch: CaptionBatch, epoch: int) -> tuple[Tensor, Terms]:
        """Compute the loss as defined by `Objective`.

        The term "loss" is the cross-entropy without label smoothing and regularization, comparable to the validation
        loss.
        """
        memory = decoder.encode(batch.grids.float())
        inputs, targets = batch.tokens[..., :-1], batch.tokens[..., 1:]
        if probability := self.sampling_prob(epoch):
            logits, attention = forward_scheduled_sampling(decoder, memory, inputs, probability)
            logits = logits.flatten(0, 2).index_select(0, batch.target_index)
        else:
            logits, attention = decoder(memory, inputs, batch.target_index)
        target_ids = targets.flatten().index_select(0, batch.target_index)
        loss, plain_loss, tokens = smoothed_cross_entropy(logits, target_ids, self._settings.label_smoothing)
        if self._attention_reg and attention is not None:
            loss = loss + self._attention_reg * attention_reg(attention, targets)
        return loss, {"tokens": tokens, "loss": plain_loss}


def forward_scheduled_sampling(
    decoder: Decoder, memory: Memory, tokens: Tensor, probability: float
) -> tuple[Tensor, Tensor | None]:
    """Run the decoder with scheduled sampling (Bengio et al. 2015, arXiv:1506.03099).

    This equals the decoder's `forward`, except that some input tokens are replaced by tokens sampled from the
    prediction for their position.

    Args:
        decoder: decoder to run.
        memory: from `decoder.encode`.
        tokens: (B, K, T) int64, reference tokens.
        probability: replacement probability per token; the first token and padding are never replaced.

    Returns:
        Logits (B, K, T, V), and attention weights (B, K, T, P) or None.
    """
    b, k, length = tokens.shape
    state = tuple(part.expand(b, k, *part.shape[2:]) for part in decoder.initial_state(memory))
    all_logits, all_attention = [], []
    inputs = tokens[..., 0]
    for t in range(length):
        logits, state, attention = decoder.step(inputs, state, memory)
        all_logits.append(logits)
        if attention is not None:
            all_attention.append(attention)
        if t + 1 < length:
            reference = tokens[..., t + 1]
            # Equivalent to torch.multinomial, which synchronizes with the device to check its input.
            probs = token_log_probs(logits.detach()).exp()
            sampled = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
            replace = (torch.rand(b, k, device=tokens.device) < probability) & (reference != PAD)
            inputs = torch.where(replace, sampled, reference)
    return torch.stack(all_logits, 2), torch.stack(all_attention, 2) if all_attention else None
