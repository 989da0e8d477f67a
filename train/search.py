"""Batched beam search; with one beam it is greedy search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.decoders.base import Decoder, State
from train.vocabulary import BOS, EOS, PAD, UNK

_NEVER = (PAD, BOS, UNK)


@dataclass(frozen=True)
class Hypothesis:
    """A decoded caption.

    Attributes:
        tokens: word ids, without BOS and EOS.
        log_prob: natural logarithm of its probability, EOS included if it ended.
        attention: (words, P) float32, where the decoder looked as it wrote each word; None for a decoder
            without attention.
    """

    tokens: list[int]
    log_prob: float
    attention: np.ndarray | None


@dataclass
class _Finished:
    """Ended hypotheses of one image: (score, log-probability, step, beam), the best kept."""

    entries: list[tuple[float, float, int, int]]

    def best(self) -> tuple[float, float, int, int]:
        return max(self.entries)


@torch.inference_mode()
def beam_search(
    decoder: Decoder, grids: Tensor, beam_size: int, max_length: int, length_penalty: float = 0.0
) -> list[Hypothesis]:
    """Decode captions for a batch of images together.

    Beams of all images advance in one batch. A step takes the best 2K of K x 2K candidates, never sorting the
    K x V. Histories are back-pointers, read once at the end. PAD, BOS and UNK are never written. When no beam
    ended within `max_length` words, the best unended one is taken.

    Args:
        decoder: in evaluation mode.
        grids: (B, P, C) on the decoder's device.
        beam_size: K; 1 is greedy search.
        max_length: longest caption, in words.
        length_penalty: hypotheses are compared by log-probability / words ** length_penalty (Wu et al. 2016,
            arXiv:1609.08144, without its constants).

    Returns:
        The best hypothesis of each image.
    """
    b, k = len(grids), beam_size
    memory = decoder.encode(grids)
    state = tuple(part.expand(b, k, *part.shape[2:]) for part in decoder.initial_state(memory))
    tokens = torch.full((b, k), BOS, device=grids.device)
    scores = torch.full((b, k), -torch.inf, device=grids.device)
    scores[:, 0] = 0.0
    ended = [_Finished([]) for _ in range(b)]
    steps: list[tuple[Tensor, Tensor, Tensor | None]] = []  # tokens, parents, attention of each step
    for length in range(max_length + 1):
        logits, state, attention = decoder.step(tokens, state, memory)
        log_probs = logits.float().log_softmax(-1)
        log_probs[..., list(_NEVER)] = -torch.inf
        per_beam = log_probs.topk(min(2 * k, log_probs.shape[-1]), -1)
        candidates = (scores[..., None] + per_beam.values).flatten(1)
        best = candidates.topk(min(2 * k, candidates.shape[1]), -1)
        parents = best.indices // per_beam.values.shape[-1]
        words = per_beam.indices.flatten(1).gather(1, best.indices)
        ends = words == EOS
        _collect_ended(ended, best.values, parents, ends, k, length, length_penalty)
        if length == max_length or all(len(done.entries) >= k for done in ended):
            break
        alive = best.values.masked_fill(ends, -torch.inf).topk(k, -1)
        scores, kept = alive.values, alive.indices
        tokens, chosen = words.gather(1, kept), parents.gather(1, kept)
        state = _select(state, chosen)
        steps.append(
            (tokens.cpu(), chosen.cpu(), None if attention is None else _select((attention,), chosen)[0].cpu())
        )
    final = scores.tolist()
    cells = None if attention is None else attention.shape[-1]
    return [_trace(steps, ended[i], final[i], i, cells) for i in range(b)]


def _collect_ended(
    ended: list[_Finished], values: Tensor, parents: Tensor, ends: Tensor, k: int, length: int, penalty: float
) -> None:
    """Keep candidates that end now and rank among the first K."""
    hits = (ends[:, :k] & (values[:, :k] > -torch.inf)).nonzero().tolist()
    if hits:
        value_list, parent_list = values.tolist(), parents.tolist()
        for image, rank in hits:
            if len(ended[image].entries) < k:
                log_prob = value_list[image][rank]
                entry = (log_prob / max(1, length) ** penalty, log_prob, length, parent_list[image][rank])
                ended[image].entries.append(entry)


def _select(state: State, beams: Tensor) -> State:
    """Reorder (B, K, ...) tensors by (B, K) beam numbers."""
    return tuple(
        part.gather(1, beams.reshape(*beams.shape, *(1,) * (part.dim() - 2)).expand(-1, -1, *part.shape[2:]))
        for part in state
    )


def _trace(
    steps: list[tuple[Tensor, Tensor, Tensor | None]],
    ended: _Finished,
    scores: list[float],
    image: int,
    cells: int | None,
) -> Hypothesis:
    """Follow the back-pointers of an image's best hypothesis."""
    if ended.entries:
        _, log_prob, length, beam = ended.best()
    else:
        beam = int(np.argmax(scores))
        log_prob, length = scores[beam], len(steps)
    tokens: list[int] = []
    looks: list[np.ndarray] = []
    for words, parents, attention in reversed(steps[:length]):
        tokens.append(int(words[image, beam]))
        if attention is not None:
            looks.append(attention[image, beam].float().numpy())
        beam = int(parents[image, beam])
    looks.reverse()
    tokens.reverse()
    return Hypothesis(tokens, log_prob, None if cells is None else np.array(looks, np.float32).reshape(-1, cells))
