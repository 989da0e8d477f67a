"""From a decoder to captions: the likeliest by beam search (with one beam: greedy search), or some drawn by chance.

Both read the decoder through `token_log_probs`, so a log-probability means the same thing everywhere. Neither uses
torch's inference mode: in it autocast keeps no weight that it has cast, and casts them all anew at every word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gridcap.common.config import CaptionConfig
from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoders.base import Decoder, Memory, State
from gridcap.train.decoders.packed import packed
from gridcap.train.decoding.mbr import rerank_mbr

_FORBIDDEN_TOKENS = (PAD, BOS, UNK)
_NOISE_BITS = 31
_COLDEST = 1e-6  # the largest difference of float32 logits that a temperature need tell apart; no division overflows


@dataclass(frozen=True)
class Hypothesis:
    """A decoded caption.

    Attributes:
        tokens: word ids, without BOS and EOS.
        log_prob: natural logarithm of its probability by `token_log_probs`, EOS included if it ended. That is the
            decoder's own: temperature, top_k, top_p and blocked trigrams do not change it.
        attention: (words, P) float32, where the decoder looked as it wrote each word; None for a decoder
            without attention.
    """

    tokens: list[int]
    log_prob: float
    attention: np.ndarray | None


_Step = tuple[Tensor, Tensor, Tensor | None]  # tokens (B, K), their parents (B, K), attention (B, K, P)
_NumpyStep = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass
class _Finished:
    """Ended hypotheses of one image: (score, log-probability, step, beam)."""

    entries: list[tuple[float, float, int, int]]

    def ranked(self, unended: list[float], steps: int) -> list[tuple[float, float, int, int]]:
        """The best first; if none ended, the best of the others: their log-probabilities after so many steps."""
        if self.entries:
            return sorted(self.entries, reverse=True)
        beam = int(np.argmax(unended))
        return [(0.0, unended[beam], steps, beam)]


def mask_special_tokens(logits: Tensor) -> Tensor:
    """The logits in float32, with -inf for PAD, BOS and UNK: (..., V) to (..., V), a copy, with gradient."""
    left = logits.to(torch.float32, copy=True)
    for token in _FORBIDDEN_TOKENS:
        left[..., token] = -torch.inf
    return left


def token_log_probs(logits: Tensor) -> Tensor:
    """The log-probability of every token that may be written: the distribution that search and sampling use.

    PAD, BOS and UNK are taken out before the softmax, so the others sum to 1. Theirs is -inf: whoever gathers it
    for padding must replace it (`masked_fill`), since -inf times 0 is not a number.

    Args:
        logits: (..., V), left as they are.

    Returns:
        (..., V) float32, with the gradient of the logits.
    """
    return mask_special_tokens(logits).log_softmax(-1)


def search_captions(
    decoder: Decoder, grids: Tensor, settings: CaptionConfig, generator: torch.Generator | None = None
) -> list[Hypothesis]:
    """Decode a caption for each image as the settings say.

    Args:
        decoder: in evaluation mode.
        grids: (B, P, C) on the decoder's device.
        settings: beam search or sampling, and its options.
        generator: for sampling; None is torch's own of the CPU. Every image takes the same count of numbers from
            it, one image after the other. So one generator for all batches gives each image the same caption
            whatever the batch size, as far as rounding allows.
    """
    if settings.decoding == "beam":
        return [best for (best,) in search_alternatives(decoder, grids, settings, 1)]
    noise = torch.stack([_noise((1, settings.max_length + 1), generator) for _ in range(len(grids))])
    with torch.no_grad():
        drawn = _sample(decoder, decoder.encode(grids), noise, settings.temperature, settings.top_k, settings.top_p)
    captions = [[t for t in row if t not in (EOS, PAD)] for row in drawn.tokens[:, 0].tolist()]
    if drawn.attention is None:
        looks: list[np.ndarray | None] = [None] * len(captions)
    else:
        cells = drawn.attention[:, 0].float().cpu().numpy()
        looks = [cells[i, : len(words)] for i, words in enumerate(captions)]
    return [Hypothesis(*parts) for parts in zip(captions, drawn.log_probs[:, 0].tolist(), looks, strict=True)]


def search_alternatives(
    decoder: Decoder, grids: Tensor, settings: CaptionConfig, count: int | None = None
) -> list[list[Hypothesis]]:
    """What a beam search ends with, as the settings say, the best first; else as `beam_alternatives`."""
    found = beam_alternatives(
        decoder,
        grids,
        settings.beam_size,
        settings.max_length,
        settings.length_penalty,
        settings.block_trigrams,
        None if settings.mbr else count,
    )
    if settings.mbr:
        orders = [rerank_mbr([one.tokens for one in image]) for image in found]
        found = [[image[i] for i in order][:count] for image, order in zip(found, orders, strict=True)]
    return found


def beam_search(
    decoder: Decoder,
    grids: Tensor,
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.0,
    block_trigrams: bool = False,
) -> list[Hypothesis]:
    """The best hypothesis of each image; else as `beam_alternatives`."""
    found = beam_alternatives(decoder, grids, beam_size, max_length, length_penalty, block_trigrams, 1)
    return [best for (best,) in found]


@torch.no_grad()
def beam_alternatives(
    decoder: Decoder,
    grids: Tensor,
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.0,
    block_trigrams: bool = False,
    count: int | None = None,
) -> list[list[Hypothesis]]:
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
        block_trigrams: never write a trigram that the caption already has (Paulus et al. 2017, arXiv:1705.04304,
            section 2.5). EOS is never blocked.
        count: of hypotheses to give of each image; None gives all that ended, at most K.

    Returns:
        The hypotheses of each image, the best first, at least one.
    """
    b, k = len(grids), beam_size
    memory = decoder.encode(grids)
    state = tuple(part.expand(b, k, *part.shape[2:]) for part in decoder.initial_state(memory))
    tokens = torch.full((b, k), BOS, device=grids.device)
    scores = torch.full((b, k), -torch.inf, device=grids.device)
    scores[:, 0] = 0.0
    ended = [_Finished([]) for _ in range(b)]
    steps: list[_Step] = []
    written = tokens.new_empty(b, k, 0)  # the words of the live beams, kept only to find trigrams
    with packed(decoder, b * k):
        for length in range(max_length + 1):
            logits, state, attention = decoder.step(tokens, state, memory)
            log_probs = token_log_probs(logits)
            if block_trigrams:
                log_probs = _block_trigrams(log_probs, written)
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
            if block_trigrams:
                written = torch.cat([_select((written,), chosen)[0], tokens[..., None]], -1)
            steps.append((tokens, chosen, None if attention is None else _select((attention,), chosen)[0]))
    # As numpy arrays, whose single numbers are read twenty times as quickly as a tensor's.
    histories: list[_NumpyStep] = [
        (words.cpu().numpy(), parents.cpu().numpy(), None if look is None else look.cpu().numpy())
        for words, parents, look in steps
    ]
    final = scores.tolist()
    cells = None if attention is None else attention.shape[-1]
    return [
        [_trace(histories, entry, i, cells) for entry in ended[i].ranked(final[i], len(steps))[:count]]
        for i in range(b)
    ]


def _block_trigrams(log_probs: Tensor, written: Tensor) -> Tensor:
    """Set the words to -inf that followed an earlier occurrence of the last two words.

    Args:
        log_probs: (B, K, V).
        written: (B, K, t) words.
    """
    if written.shape[-1] < 3:
        return log_probs
    first, second, third = written[..., :-2], written[..., 1:-1], written[..., 2:]
    again = (first == written[..., -2:-1]) & (second == written[..., -1:])
    # Where the pair is another one, PAD is blocked instead, which it is anyway.
    return log_probs.scatter(-1, third.masked_fill(~again, PAD), -torch.inf)


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
    steps: list[_NumpyStep],
    entry: tuple[float, float, int, int],
    image: int,
    cells: int | None,
) -> Hypothesis:
    """Follow the back-pointers of one of an image's hypotheses."""
    _, log_prob, length, beam = entry
    tokens: list[int] = []
    looks: list[np.ndarray] = []
    for words, parents, attention in reversed(steps[:length]):
        tokens.append(int(words[image, beam]))
        if attention is not None:
            looks.append(attention[image, beam])
        beam = int(parents[image, beam])
    looks.reverse()
    tokens.reverse()
    return Hypothesis(tokens, log_prob, None if cells is None else np.array(looks, np.float32).reshape(-1, cells))


@dataclass
class _Samples:
    """Drawn captions.

    Attributes:
        tokens: (B, K, T) int64: words, EOS unless it was cut, PAD.
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
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw captions, word by word, all of all images together. PAD, BOS and UNK are never drawn.

    The temperature comes first, then top_k, then top_p of what is left. Without gradient, and in no inference
    mode: the tokens may go into a forward pass for training.

    Args:
        decoder: in the mode that it shall be sampled in.
        memory: from its `encode`.
        samples: K, captions of each image.
        max_length: longest caption, in words. As in beam search, a caption of so many words may still end; if it
            does not, it is cut and has no EOS.
        temperature: the logits are divided by it.
        top_k: draw from the k likeliest words; with those that tie with the k-th it may be more.
        top_p: draw from the smallest set of likeliest words whose probabilities reach this, at least one (Holtzman
            et al. 2019, arXiv:1904.09751).
        generator: on any device; None is torch's own of the CPU.

    Returns:
        (B, K, T) int64: words, then EOS, then PAD; T is the longest caption's, EOS included.
    """
    noise = _noise((len(memory[0]), samples, max_length + 1), generator)
    return _sample(decoder, memory, noise, temperature, top_k, top_p).tokens


def _noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform whole numbers below 2 ** 31, one for each word that may be drawn, whether or not it will be."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(1 << _NOISE_BITS, shape, generator=generator, device=device)


def _sample(
    decoder: Decoder, memory: Memory, noise: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> _Samples:
    """As `sample_tokens`, from the given noise (B, K, max_length + 1): a caption depends on its own alone."""
    noise = noise.to(memory[0].device)
    b, k, steps = noise.shape
    state = tuple(part.expand(b, k, *part.shape[2:]) for part in decoder.initial_state(memory))
    tokens = torch.full((b, k), BOS, device=noise.device)
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    total = torch.zeros(b, k, device=noise.device)
    written: list[Tensor] = []
    looks: list[Tensor] = []
    with packed(decoder, b * k):
        for i in range(steps):
            logits, state, attention = decoder.step(tokens, state, memory)
            log_probs = token_log_probs(logits)
            tokens = _draw(_truncate(log_probs, temperature, top_k, top_p), noise[..., i])
            if i == steps - 1:  # no room for another word: the caption ends here or is cut
                ended = ended | (tokens != EOS)
            tokens = tokens.masked_fill(ended, PAD)
            total += log_probs.gather(-1, tokens[..., None])[..., 0].masked_fill(ended, 0.0)
            written.append(tokens)
            if attention is not None:
                looks.append(attention)
            ended = ended | (tokens == EOS)
            if ended.all():
                break
    if (written[-1] == PAD).all():  # all were cut
        written.pop()
    return _Samples(torch.stack(written, -1), total, torch.stack(looks, 2) if looks else None)


def _truncate(log_probs: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities (B, K, V) to draw from, up to a factor of each row."""
    scaled = log_probs / max(temperature, _COLDEST)
    if top_k is not None:
        smallest = scaled.topk(min(top_k, scaled.shape[-1]), -1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probs = scaled.softmax(-1)
    if top_p is not None and top_p < 1:  # at 1, rounding alone would leave words out
        ordered, order = probs.sort(stable=True, dim=-1, descending=True)
        reached = ordered.cumsum(-1) - ordered >= top_p  # without this word already
        probs = probs.masked_fill(reached.scatter(-1, order, reached), 0.0)
    return probs


def _draw(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw a token from each row of (B, K, V) by inverting its cumulative sum at the noise (B, K).

    The sum is of whole numbers, which add up to the same in any order, so that a word of probability 0 is never
    drawn, and every device draws the same. Not torch.multinomial: its noise is for all V words, and how much of it
    an image gets depends on the batch.
    """
    edges = (probs * (1 << _NOISE_BITS)).round().long().cumsum(-1)
    at = noise * edges[..., -1] >> _NOISE_BITS  # below the last edge
    found = torch.searchsorted(edges, at[..., None], right=True)[..., 0]
    return found.clamp_max(probs.shape[-1] - 1)  # what a decoder that gives NaN would leave
