"""Beam search over a batch of images. Greedy decoding is beam search with one beam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gridcap.train.data.vocabulary import BOS, EOS, PAD
from gridcap.train.decoders.base import Decoder, State
from gridcap.train.decoders.packed import packed
from gridcap.train.decoding.base import NEVER_GENERATED, Hypothesis, token_log_probs


@dataclass(frozen=True)
class BeamOptions:
    """Options of beam search.

    Attributes:
        beam_size: K, hypotheses kept per image; 1 is greedy decoding.
        max_length: maximum caption length in tokens, not counting EOS.
        length_penalty: finished hypotheses are ranked by log-probability / length ** length_penalty (Wu et al. 2016,
            arXiv:1609.08144, without its constants).
        block_trigrams: never generate a trigram that the hypothesis already contains (Paulus et al. 2017,
            arXiv:1705.04304, section 2.5). EOS is never blocked.
        forbidden: ids of tokens, besides PAD and BOS, that are never generated.
    """

    beam_size: int
    max_length: int
    length_penalty: float = 0.0
    block_trigrams: bool = False
    forbidden: tuple[int, ...] = NEVER_GENERATED


class _Candidates(NamedTuple):
    """The best continuations of each image, best first, (B, N) each."""

    scores: Tensor
    parents: Tensor
    tokens: Tensor


class _Finished(NamedTuple):
    """A finished hypothesis: its last token is at step `length - 1` of beam `beam`. Fields in ranking order."""

    score: float
    log_prob: float
    length: int
    beam: int


class _Step(NamedTuple):
    """Back-pointers of one step, tensors during the search and arrays afterwards."""

    tokens: Tensor  # (B, K)
    parents: Tensor  # (B, K)
    attention: Tensor | None  # (B, K, P)


_NumpyStep = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def beam_search(decoder: Decoder, grids: Tensor, options: BeamOptions) -> list[Hypothesis]:
    """Return the best hypothesis per image; see `beam_search_nbest`."""
    return [best for (best,) in beam_search_nbest(decoder, grids, options, 1)]


@torch.no_grad()
def beam_search_nbest(
    decoder: Decoder, grids: Tensor, options: BeamOptions, count: int | None = None
) -> list[list[Hypothesis]]:
    """Return the n-best hypotheses per image, best first.

    The beams of all images advance in one batch. If no beam of an image reaches EOS, the best unfinished hypothesis is
    returned.

    Args:
        decoder: decoder in evaluation mode.
        grids: (B, P, C) grids on the decoder's device.
        options: beam size, length, and ranking.
        count: hypotheses returned per image; None returns all finished ones, at most K.

    Returns:
        For each image, between 1 and K hypotheses.
    """
    b, k = len(grids), options.beam_size
    memory = decoder.encode(grids)
    state = tuple(part.expand(b, k, *part.shape[2:]) for part in decoder.initial_state(memory))
    tokens = torch.full((b, k), BOS, device=grids.device)
    scores = torch.full((b, k), -torch.inf, device=grids.device)
    scores[:, 0] = 0.0  # the K beams are identical before the first token
    finished: list[list[_Finished]] = [[] for _ in range(b)]
    steps: list[_Step] = []
    prefixes = tokens.new_empty(b, k, 0)  # tokens of the live beams, only maintained for trigram blocking
    with packed(decoder, b * k):
        for length in range(options.max_length + 1):
            logits, state, attention = decoder.step(tokens, state, memory)
            log_probs = token_log_probs(logits, options.forbidden)
            if options.block_trigrams:
                log_probs = _block_trigrams(log_probs, prefixes)
            candidates = _top_candidates(scores, log_probs, 2 * k)
            _collect_finished(finished, candidates, length, options)
            if length == options.max_length or all(len(image) >= k for image in finished):
                break
            alive = candidates.scores.masked_fill(candidates.tokens == EOS, -torch.inf).topk(k, -1)
            scores = alive.values
            tokens, parents = candidates.tokens.gather(1, alive.indices), candidates.parents.gather(1, alive.indices)
            state = _select(state, parents)
            if options.block_trigrams:
                prefixes = torch.cat([_select((prefixes,), parents)[0], tokens[..., None]], -1)
            steps.append(_Step(tokens, parents, None if attention is None else _select((attention,), parents)[0]))
    final = scores.tolist()
    # Reading single values from NumPy arrays is about 20 times faster than from tensors.
    history: list[_NumpyStep] = [
        (
            step.tokens.cpu().numpy(),
            step.parents.cpu().numpy(),
            None if (a := step.attention) is None else a.cpu().numpy(),
        )
        for step in steps
    ]
    cells = None if attention is None else attention.shape[-1]
    return [
        [_trace(history, entry, i, cells) for entry in _ranked(finished[i], final[i], len(steps))[:count]]
        for i in range(b)
    ]


def _top_candidates(scores: Tensor, log_probs: Tensor, count: int) -> _Candidates:
    """Return the best `count` continuations per image.

    A continuation among the best N of its image is among the best N of its beam, so the K * V scores are never
    sorted together.

    Args:
        scores: (B, K) log-probabilities of the beams.
        log_probs: (B, K, V).
        count: N.
    """
    per_beam = log_probs.topk(min(count, log_probs.shape[-1]), -1)
    flat = (scores[..., None] + per_beam.values).flatten(1)
    best = flat.topk(min(count, flat.shape[1]), -1)
    parents = best.indices // per_beam.values.shape[-1]
    return _Candidates(best.values, parents, per_beam.indices.flatten(1).gather(1, best.indices))


def _block_trigrams(log_probs: Tensor, prefixes: Tensor) -> Tensor:
    """Set the tokens that would repeat a trigram to -inf.

    Args:
        log_probs: (B, K, V).
        prefixes: (B, K, T) tokens generated so far.
    """
    if prefixes.shape[-1] < 3:
        return log_probs
    first, second, third = prefixes[..., :-2], prefixes[..., 1:-1], prefixes[..., 2:]
    repeated = (first == prefixes[..., -2:-1]) & (second == prefixes[..., -1:])
    # Other positions scatter to PAD, which is -inf already.
    return log_probs.scatter(-1, third.masked_fill(~repeated, PAD), -torch.inf)


def _collect_finished(
    finished: list[list[_Finished]], candidates: _Candidates, length: int, options: BeamOptions
) -> None:
    """Add the candidates that end with EOS and rank among the best K of their image."""
    k = options.beam_size
    ends = candidates.tokens == EOS
    hits = (ends[:, :k] & (candidates.scores[:, :k] > -torch.inf)).nonzero().tolist()
    if not hits:  # the usual case: avoid copying the scores to the host
        return
    scores, parents = candidates.scores.tolist(), candidates.parents.tolist()
    for image, rank in hits:
        if len(finished[image]) < k:
            log_prob = scores[image][rank]
            score = log_prob / max(1, length) ** options.length_penalty
            finished[image].append(_Finished(score, log_prob, length, parents[image][rank]))


def _ranked(finished: list[_Finished], unfinished: list[float], length: int) -> list[_Finished]:
    """Return the finished hypotheses, best first, or else the best unfinished one.

    Args:
        finished: finished hypotheses of one image.
        unfinished: K log-probabilities of the beams after the last step.
        length: number of steps.
    """
    if finished:
        return sorted(finished, reverse=True)
    beam = int(np.argmax(unfinished))
    return [_Finished(0.0, unfinished[beam], length, beam)]


def _select(state: State, beams: Tensor) -> State:
    """Reorder (B, K, ...) tensors by (B, K) beam indices."""
    return tuple(
        part.gather(1, beams.reshape(*beams.shape, *(1,) * (part.dim() - 2)).expand(-1, -1, *part.shape[2:]))
        for part in state
    )


def _trace(history: list[_NumpyStep], entry: _Finished, image: int, cells: int | None) -> Hypothesis:
    """Follow the back-pointers of one hypothesis; `cells` is P, or None without attention."""
    beam = entry.beam
    tokens: list[int] = []
    weights: list[np.ndarray] = []
    for step_tokens, parents, attention in reversed(history[: entry.length]):
        tokens.append(int(step_tokens[image, beam]))
        if attention is not None:
            weights.append(attention[image, beam])
        beam = int(parents[image, beam])
    attention_map = None if cells is None else np.array(weights[::-1], np.float32).reshape(-1, cells)
    return Hypothesis(tokens[::-1], entry.log_prob, attention_map)
