"""Sampling against the exact distribution of table decoders."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoding.sampling import SamplingOptions, _choose, sample_tokens
from tests.train.decoding.table_decoders import (
    MAX_LENGTH,
    SEEDS,
    SOME,
    TOKENS,
    ChainDecoder,
    V,
    code_of,
    grids,
    random_decoder,
    seeded,
    without_specials,
)


def sample(decoder, images, samples, max_length=MAX_LENGTH, seed=0, **options):
    return sample_tokens(
        decoder, decoder.encode(grids(*images)), samples, SamplingOptions(max_length, **options), generator=seeded(seed)
    )


def truncated_distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """Return the truncated distribution of one token, computed token by token."""
    left = dict(enumerate((without_specials(logits) / temperature).tolist()))
    left = {token: np.exp(value) for token, value in left.items() if value > -np.inf}
    ranked = sorted(left, key=left.get, reverse=True)[:top_k]
    whole, kept, mass = sum(left[t] for t in ranked), [], 0.0
    for token in ranked:
        kept.append(token)
        mass += left[token] / whole
        if top_p is not None and mass >= top_p:
            break
    return {token: left[token] / sum(left[t] for t in kept) for token in kept}


def distribution(decoder, image, **options):
    """Return a mapping from each possible row of `sample_tokens`, without padding, to its probability."""
    finished, unfinished = {}, {(): 1.0}
    for length in range(MAX_LENGTH + 1):
        longer = {}
        for tokens, chance in unfinished.items():
            logits = decoder.table[image, code_of([BOS, *tokens])]
            for token, part in truncated_distribution(logits, **options).items():
                if token == EOS:
                    finished[(*tokens, EOS)] = chance * part
                elif length == MAX_LENGTH:
                    finished[tokens] = finished.get(tokens, 0.0) + chance * part
                else:
                    longer[(*tokens, token)] = chance * part
        unfinished = longer
    return finished


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 2},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.7},
    ],
    ids=str,
)
def test_sample_frequencies_match_probabilities(options):
    decoder, count = random_decoder(7, end=0.5), 20_000
    rows = sample(decoder, (0, 1), count, **options)
    assert rows.shape == (2, count, MAX_LENGTH + 1)
    for image in (0, 1):
        expected = distribution(decoder, image, **options)
        assert sum(expected.values()) == pytest.approx(1)
        counts = Counter(tuple(t for t in row if t != PAD) for row in rows[image].tolist())
        assert set(counts) <= set(expected), "captions of probability 0 are never sampled"
        for tokens, chance in expected.items():
            spread = (count * chance * (1 - chance)) ** 0.5
            assert abs(counts[tokens] - count * chance) < 5 * spread + 3


def first_tokens(probabilities, **options):
    """Return the sampled tokens, given the probabilities of tokens 4, 5, ..."""
    table = torch.full((4 + len(probabilities),) * 2, -torch.inf)
    table[:, 4:] = torch.tensor(probabilities).log()
    return set(sample(ChainDecoder(table), (0,), 3000, 1, **options).unique().tolist())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {6}),
        (0.45, {6}),
        (0.55, {6, 4}),
        (0.75, {6, 4}),
        (0.85, {6, 4, 7}),
        (0.99, {4, 5, 6, 7}),
        (1.0, {4, 5, 6, 7}),
    ],
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    assert first_tokens([0.3, 0.05, 0.5, 0.15], top_p=top_p) == kept


@pytest.mark.parametrize(("top_k", "kept"), [(1, {6}), (2, {4, 5, 6}), (3, {4, 5, 6}), (4, {4, 5, 6, 7}), (99, None)])
def test_top_k_keeps_ties(top_k, kept):
    assert first_tokens([0.25, 0.25, 0.4, 0.1], top_k=top_k) == (kept or {4, 5, 6, 7})


def test_temperature_and_top_k_apply_before_top_p():
    assert first_tokens([0.4, 0.3, 0.3], top_p=0.5) == {4, 5}
    assert first_tokens([0.4, 0.3, 0.3], top_p=0.5, temperature=0.1) == {4}
    assert first_tokens([0.5, 0.2, 0.15, 0.15], top_p=0.7, top_k=2) == {4}  # 0.5 of 0.7 is more than 0.7


@SOME
@given(SEEDS, st.sampled_from([-3.0, 0.0, 2.0]), st.integers(1, 6))
def test_rows_are_tokens_eos_padding_without_superfluous_columns(seed, end, samples):
    rows = sample(random_decoder(seed, end=end), (0, 1, 2, 3), samples, seed=seed)
    assert rows.dtype == torch.int64
    assert (rows != PAD).any(-1).all()
    assert (rows[..., -1] != PAD).any(), "no column of padding only"
    for row in rows.flatten(0, 1).tolist():
        tokens = list(itertools.takewhile(lambda t: t in TOKENS, row))
        after = row[len(tokens) :]
        assert len(tokens) <= MAX_LENGTH
        if len(tokens) < MAX_LENGTH or after:
            assert after in ([EOS] + [PAD] * (len(after) - 1), [PAD] * len(after))
        if PAD in after and EOS not in after:
            assert len(tokens) == MAX_LENGTH, "only cut captions lack EOS"


@pytest.mark.parametrize("max_length", [1, 2, MAX_LENGTH])
def test_unfinished_captions_are_cut_without_eos(max_length):
    decoder = random_decoder(0)
    decoder.table[..., EOS] = -torch.inf
    rows = sample(decoder, (0, 1), 4, max_length)
    assert rows.shape == (2, 4, max_length)
    assert set(rows.unique().tolist()) <= set(TOKENS)


def test_sampling_stops_when_all_captions_have_ended():
    table = torch.full((5, 5), -torch.inf)
    table[BOS, 4] = table[4, EOS] = 0.0
    decoder = ChainDecoder(table)
    assert sample(decoder, (0, 0), 3, 30).tolist() == [[[4, EOS]] * 3] * 2
    assert decoder.steps == 2


@SOME
@given(SEEDS)
def test_pad_bos_and_unk_are_never_sampled(seed):
    decoder = random_decoder(seed)
    decoder.table[..., [PAD, BOS, UNK]] += 50
    rows = sample(decoder, (0, 1, 2, 3), 50)
    assert not ((rows == BOS) | (rows == UNK)).any()
    assert (rows[..., 0] != PAD).all()


def test_samples_depend_only_on_the_seed():
    decoder = random_decoder(5, end=-2.0)
    first, again, other = (sample(decoder, (0, 1), 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert len({tuple(row) for row in first[0].tolist()}) > 5, "the samples of an image are independent"


def test_ended_captions_do_not_affect_others():
    decoder = random_decoder(5, end=-2.0)
    before = sample(decoder, (0, 1), 20)
    decoder.table[1, :, EOS] += 100
    after = sample(decoder, (0, 1), 20)
    assert (after[1, :, 0] == EOS).all()
    assert [[t for t in row if t != PAD] for row in after[0].tolist()] == [
        [t for t in row if t != PAD] for row in before[0].tolist()
    ]


def test_sampled_tokens_have_no_gradient_and_can_be_used_in_training():
    decoder = random_decoder(2)
    decoder.table.requires_grad_()
    real, with_gradient = decoder.step, []
    decoder.step = lambda *given: (with_gradient.append(torch.is_grad_enabled()), real(*given))[1]
    rows = sample(decoder, (0, 1), 3)
    assert not any(with_gradient)
    assert not rows.is_inference()
    embedding = torch.nn.Embedding(V, 2)
    embedding(rows).sum().backward()
    assert torch.isfinite(embedding.weight.grad).all()


@pytest.mark.parametrize(
    ("noise", "token"), [(0, 2), (2**29 - 1, 2), (2**29, 4), (2**30 - 1, 4), (2**30, 5), (2**31 - 1, 5)]
)
def test_extreme_noise_never_selects_tokens_of_probability_zero(noise, token):
    probs = torch.tensor([[[0.0, 0.0, 0.25, 0.0, 0.25, 0.5, 0.0]]])
    assert _choose(probs, torch.tensor([[noise]])).item() == token
    assert _choose(probs * 0.375, torch.tensor([[noise]])).item() == token, "scale-invariant"


def test_nan_logits_still_yield_valid_tokens():
    rows = sample(ChainDecoder(torch.full((6, 6), torch.nan)), (0,), 5, 4)
    assert ((rows >= 0) & (rows < 6)).all()
