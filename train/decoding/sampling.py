"""Sampling of captions, with temperature, top-k, and top-p (nucleus) truncation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gridcap.train.data.vocabulary import BOS, EOS, PAD
from gridcap.train.decoders.base import Decoder, Memory
from gridcap.train.decoders.packed import packed
from gridcap.train.decoding.base import NEVER_GENERATED, Hypothesis, token_log_probs

_NOISE_BITS = 31
_MIN_TEMPERATURE = 1e-6  # lower temperatures change no float32 result and would overflow the division


@dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling. The temperature is applied first, then top-k, then top-p.

    Attributes:
        max_length: maximum caption length in tokens, not counting EOS. As in beam search, a caption of this length
            may still end with EOS; otherwise it is cut and has no EOS.
        temperature: divisor of the logits; <1 sharpens the distribution, >1 flattens it.
        top_k: sample from the k most likely tokens (more if tokens tie with the k-th).
        top_p: sample from the smallest set of most likely tokens with at least this total probability (Holtzman
            et al. 2019, arXiv:1904.09751).
        forbidden: ids of tokens, besides PAD and BOS, that are never sampled.
    """

    max_length: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    forbidden: tuple[int, ...] = NEVER_GENERATED


@dataclass
class _Samples:
    """Sampled captions.

    Attributes:
        tokens: (B, K, T) int64 tokens, then EOS unless the caption was cut, then PAD.
        log_probs: (B, K), as for `Hypothesis`.
        attention: (B, K, T or T + 1, P), or None for a decoder without attention.
    """

    tokens: Tensor
    log_probs: Tensor
    attention: Tensor | None


@torch.no_grad()
def sample_tokens(
    decoder: Decoder,
    memory: Memory,
    samples: int,
    options: SamplingOptions,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample captions of all images in one batch.

    Args:
        decoder: decoder in the mode (training or evaluation) to sample in.
        memory: result of `decoder.encode`.
        samples: K, captions per image.
        options: length, temperature, and truncation.
        generator: random generator on any device (default: PyTorch's CPU generator).

    Returns:
        (B, K, T) int64: tokens, then EOS, then PAD. T is the length of the longest caption, including EOS. The
        tensor may be used in a forward pass for training.
    """
    noise = _random_integers((len(memory[0]), samples, options.max_length + 1), generator)
    return _sample(decoder, memory, noise, options).tokens


@torch.no_grad()
def sample_hypotheses(
    decoder: Decoder, grids: Tensor, options: SamplingOptions, generator: torch.Generator | None = None
) -> list[Hypothesis]:
    """Sample one caption per image.

    Every image consumes the same amount of random numbers, one image after another. With one generator for all
    batches, the captions do not depend on the batch size, up to rounding.

    Args:
        decoder: decoder in evaluation mode.
        grids: (B, P, C) grids on the decoder's device.
        options: length, temperature, and truncation.
        generator: random generator on any device (default: PyTorch's CPU generator).
    """
    noise = torch.stack([_random_integers((1, options.max_length + 1), generator) for _ in range(len(grids))])
    samples = _sample(decoder, decoder.encode(grids), noise, options)
    captions = [[t for t in row if t not in (EOS, PAD)] for row in samples.tokens[:, 0].tolist()]
    log_probs = samples.log_probs[:, 0].tolist()
    if samples.attention is None:
        return [Hypothesis(tokens, log_prob, None) for tokens, log_prob in zip(captions, log_probs, strict=True)]
    attention = samples.attention[:, 0].float().cpu().numpy()
    return [
        Hypothesis(tokens, log_prob, weights[: len(tokens)])
        for tokens, log_prob, weights in zip(captions, log_probs, attention, strict=True)
    ]


def _random_integers(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Return uniform random integers below 2 ** 31, one for each token that may be sampled."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(1 << _NOISE_BITS, shape, generator=generator, device=device)


def _sample(decoder: Decoder, memory: Memory, noise: Tensor, options: SamplingOptions) -> _Samples:
    """Sample with the given noise (B, K, max_length + 1); a caption depends only on its own noise."""
    noise = noise.to(memory[0].device)
    b, k, steps = noise.shape
    state = tuple(part.expand(b, k, *part.shape[2:]) for part in decoder.initial_state(memory))
    tokens = torch.full((b, k), BOS, device=noise.device)
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    total = torch.zeros(b, k, device=noise.device)
    sampled: list[Tensor] = []
    attentions: list[Tensor] = []
    with packed(decoder, b * k):
        for i in range(steps):
            logits, state, attention = decoder.step(tokens, state, memory)
            log_probs = token_log_probs(logits, options.forbidden)
            tokens = _choose(_truncate(log_probs, options), noise[..., i])
            if i == steps - 1:  # maximum length reached: only EOS is allowed here, other captions are cut
                ended = ended | (tokens != EOS)
            tokens = tokens.masked_fill(ended, PAD)
            total += log_probs.gather(-1, tokens[..., None])[..., 0].masked_fill(ended, 0.0)
            sampled.append(tokens)
            if attention is not None:
                attentions.append(attention)
            ended = ended | (tokens == EOS)
            if ended.all():
                break
    if (sampled[-1] == PAD).all():  # every caption was cut
        sampled.pop()
    return _Samples(torch.stack(sampled, -1), total, torch.stack(attentions, 2) if attentions else None)


def _truncate(log_probs: Tensor, options: SamplingOptions) -> Tensor:
    """Return unnormalized probabilities (B, K, V) after temperature, top-k, and top-p."""
    scaled = log_probs / max(options.temperature, _MIN_TEMPERATURE)
    if options.top_k is not None:
        smallest = scaled.topk(min(options.top_k, scaled.shape[-1]), -1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probs = scaled.softmax(-1)
    if options.top_p is not None and options.top_p < 1:  # at 1, rounding would exclude tokens
        ordered, order = probs.sort(stable=True, dim=-1, descending=True)
        excluded = ordered.cumsum(-1) - ordered >= options.top_p  # the more likely tokens suffice
        probs = probs.masked_fill(excluded.scatter(-1, order, excluded), 0.0)
    return probs


def _choose(probs: Tensor, noise: Tensor) -> Tensor:
    """Sample a token from each row of (B, K, V) by inverting its cumulative sum at the noise (B, K).

    The cumulative sum is over integers, which is exact in any order: tokens of probability 0 are never sampled, and
    all devices sample the same tokens. `torch.multinomial` consumes noise for all V tokens, and the amount per image
    depends on the batch.
    """
    edges = (probs * (1 << _NOISE_BITS)).round().long().cumsum(-1)
    threshold = noise * edges[..., -1] >> _NOISE_BITS  # below the last edge
    tokens = torch.searchsorted(edges, threshold[..., None], right=True)[..., 0]
    return tokens.clamp_max(probs.shape[-1] - 1)  # stay in range if the decoder returned NaN
