"""Beam search against exhaustive search over table decoders."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoding.beam import BeamOptions, beam_search, beam_search_nbest
from tests.train.decoding.table_decoders import (
    ALL_BEAMS,
    MAX_LENGTH,
    SEEDS,
    SOME,
    TOKENS,
    ChainDecoder,
    TableDecoder,
    V,
    argmax_loop,
    code_of,
    exhaustive_search,
    grids,
    log_prob,
    random_chain,
    random_decoder,
    repeats,
    repetitive_decoder,
    without_specials,
)


@SOME
@given(SEEDS, st.sampled_from([-1.0, 0.0, 1.0]))
def test_greedy_equals_argmax_loop(seed, end):
    decoder = random_decoder(seed, end=end)
    hypotheses = beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(1, MAX_LENGTH))
    assert [h.tokens for h in hypotheses] == [argmax_loop(decoder, image) for image in range(4)]


@SOME
@given(SEEDS, st.sampled_from([0.0, 1.0]), st.sampled_from([-2.0, 0.0]))
def test_full_beam_equals_exhaustive_search(seed, penalty, end):
    decoder = random_decoder(seed, end=end)
    hypotheses = beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(ALL_BEAMS, MAX_LENGTH, penalty))
    for image, hypothesis in enumerate(hypotheses):
        assert hypothesis.tokens == exhaustive_search(decoder, image, penalty)
        assert hypothesis.log_prob == pytest.approx(log_prob(decoder, image, hypothesis.tokens), abs=1e-4)


@SOME
@given(SEEDS, st.sampled_from([0.0, 1.0]))
def test_nbest_equals_exhaustive_ranking(seed, penalty):
    decoder = random_decoder(seed, images=2)
    captions = [list(c) for n in range(MAX_LENGTH + 1) for c in itertools.product(TOKENS, repeat=n)]
    for image, hypotheses in enumerate(
        beam_search_nbest(decoder, grids(0, 1), BeamOptions(ALL_BEAMS, MAX_LENGTH, penalty), count=5)
    ):
        scores = {tuple(w): log_prob(decoder, image, w) / max(1, len(w)) ** penalty for w in captions}
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:5]
        assert [scores[tuple(h.tokens)] for h in hypotheses] == pytest.approx(
            [scores[tokens] for tokens in best], abs=1e-4
        )


def test_length_penalty_favors_longer_captions():
    table = torch.full((1, V ** (MAX_LENGTH + 1), V), -50.0)
    table[0, code_of([BOS])] = torch.tensor([-50, -50, 0.55, -50, 0.45, -50, -50]).clamp_min(1e-20).log()
    table[0, code_of([BOS, 4]), 5] = 0.0
    table[0, code_of([BOS, 4, 5]), EOS] = 0.0
    decoder = TableDecoder(table)
    short, long = (
        beam_search(decoder, grids(0), BeamOptions(3, MAX_LENGTH, penalty))[0].tokens for penalty in (0.0, 1.0)
    )
    assert (short, long) == ([], [4, 5])


@SOME
@given(SEEDS, st.integers(1, 5))
def test_pad_bos_and_unk_are_never_generated(seed, beams):
    decoder = random_decoder(seed)
    decoder.table[..., [PAD, BOS, UNK]] += 20
    for hypothesis in beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(beams, MAX_LENGTH)):
        assert set(hypothesis.tokens) <= set(TOKENS)


@SOME
@given(SEEDS, st.integers(1, 4), st.sampled_from([0.0, 0.7]), st.sampled_from([-1.0, 0.0, 2.0]))
def test_batch_equals_single_images(seed, beams, penalty, end):
    decoder = random_decoder(seed, end=end)
    order = (2, 0, 3, 1, 2)
    batch = beam_search(decoder, grids(*order), BeamOptions(beams, MAX_LENGTH, penalty))
    alone = [beam_search(decoder, grids(image), BeamOptions(beams, MAX_LENGTH, penalty))[0] for image in order]
    for a, b in zip(batch, alone, strict=True):
        assert a.tokens == b.tokens
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-5)
        if a.tokens:
            assert np.array_equal(a.attention, b.attention)


@SOME
@given(SEEDS, st.integers(1, 5), st.sampled_from([-100.0, 0.0]))
def test_log_prob_includes_eos_if_finished(seed, beams, end):
    decoder = random_decoder(seed, end=end)
    for image, hypothesis in enumerate(beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(beams, MAX_LENGTH))):
        possible = [log_prob(decoder, image, hypothesis.tokens, ended) for ended in (True, False)]
        if len(hypothesis.tokens) < MAX_LENGTH:
            possible.pop()
        assert any(hypothesis.log_prob == pytest.approx(value, abs=1e-4) for value in possible)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_best_unfinished_hypothesis_is_returned_if_none_finishes(beams):
    decoder = random_decoder(0)
    decoder.table[..., EOS] = -torch.inf
    for max_length in (1, 2, MAX_LENGTH):
        for image, hypothesis in enumerate(beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(beams, max_length))):
            assert len(hypothesis.tokens) == max_length
            assert hypothesis.log_prob == pytest.approx(
                log_prob(decoder, image, hypothesis.tokens, ended=False), abs=1e-4
            )
            if beams == 1:
                assert hypothesis.tokens == argmax_loop(decoder, image)[:max_length]


def test_finished_hypotheses_rank_before_unfinished_ones():
    table = torch.zeros(1, V ** (MAX_LENGTH + 1), V)
    table[..., EOS] = -torch.inf
    table[0, code_of([BOS]), EOS] = 2.0
    assert beam_search(TableDecoder(table), grids(0), BeamOptions(2, MAX_LENGTH))[0].tokens == []


@SOME
@given(SEEDS, st.integers(1, 5))
def test_attention_of_a_token_belongs_to_its_prefix(seed, beams):
    decoder = random_decoder(seed, end=-2.0)
    order = (3, 1, 0)
    for image, hypothesis in zip(
        order, beam_search(decoder, grids(*order), BeamOptions(beams, MAX_LENGTH)), strict=True
    ):
        if not hypothesis.tokens:
            continue
        assert hypothesis.attention.dtype == np.float32
        assert len(hypothesis.attention) == len(hypothesis.tokens)
        for i, (history, attended) in enumerate(hypothesis.attention):
            assert attended == image
            assert history == code_of([BOS, *hypothesis.tokens[:i]])


def test_attention_is_none_for_decoders_without_attention():
    decoder = random_decoder(0, with_attention=False)
    assert all(h.attention is None for h in beam_search(decoder, grids(0, 1), BeamOptions(2, MAX_LENGTH)))


def test_beam_size_may_exceed_vocabulary_size():
    decoder = random_decoder(1)
    assert beam_search(decoder, grids(0), BeamOptions(50, MAX_LENGTH))[0].tokens == exhaustive_search(decoder, 0, 0.0)


def test_encode_is_called_once_per_batch():
    decoder = random_decoder(3)
    calls = []
    real = decoder._project
    decoder._project = lambda grid: (calls.append(grid.shape), real(grid))[1]
    beam_search(decoder, grids(0, 1, 2), BeamOptions(5, MAX_LENGTH))
    assert calls == [(3, 2, 3)]


def test_beam_search_needs_no_gradients():
    decoder = random_decoder(2)
    decoder.table.requires_grad_()
    assert isinstance(beam_search(decoder, grids(0), BeamOptions(2, MAX_LENGTH))[0].log_prob, float)


# --- trigram blocking ---


def chain_log_prob(decoder, tokens, ended=True):
    log_probs = without_specials(decoder.table)
    path = [BOS, *tokens, *([EOS] if ended else [])]
    return sum(log_probs[a, b].item() for a, b in itertools.pairwise(path))


def blocked_argmax_loop(decoder, max_length):
    log_probs, tokens = without_specials(decoder.table), []
    for length in range(max_length + 1):
        row = log_probs[tokens[-1] if tokens else BOS].clone()
        for token in range(4, len(row)):
            if repeats([*tokens, token]):
                row[token] = -torch.inf
        token = int(row.argmax())
        if token == EOS:
            return tokens, True
        if length < max_length:
            tokens.append(token)
    return tokens, False


@SOME
@given(SEEDS, st.integers(1, 3), st.sampled_from([-4.0, -1.0]))
def test_greedy_blocking_equals_argmax_loop_without_repeats(seed, tokens, end):
    decoder = random_chain(seed, tokens, end)
    expected, ended = blocked_argmax_loop(decoder, 12)
    for hypothesis in beam_search(decoder, grids(0, 0), BeamOptions(1, 12, block_trigrams=True)):
        assert hypothesis.tokens == expected
        assert hypothesis.log_prob == pytest.approx(chain_log_prob(decoder, expected, ended), abs=1e-3)


@SOME
@given(SEEDS, st.sampled_from([0.0, 1.0]))
def test_full_beam_with_blocking_equals_exhaustive_search_without_repeats(seed, penalty):
    decoder = random_chain(seed, tokens=2, end=-3.0)
    captions = [list(c) for n in range(8) for c in itertools.product((4, 5), repeat=n) if not repeats(c)]
    best = max(chain_log_prob(decoder, tokens) / max(1, len(tokens)) ** penalty for tokens in captions)
    (hypothesis,) = beam_search(decoder, grids(0), BeamOptions(300, 7, penalty, block_trigrams=True))
    assert not repeats(hypothesis.tokens)
    assert hypothesis.log_prob == pytest.approx(chain_log_prob(decoder, hypothesis.tokens), abs=1e-3)
    assert hypothesis.log_prob / max(1, len(hypothesis.tokens)) ** penalty == pytest.approx(best, abs=1e-3), (
        "ties are possible"
    )


@SOME
@given(SEEDS, st.integers(2, 5))
def test_no_image_repeats_a_trigram(seed, beams):
    """Beams are reordered at every step, and their prefixes must be reordered too."""
    table = random_chain(seed, end=-3.0).table
    decoder = random_decoder(seed)
    decoder.step = lambda tokens, state, memory: (table[tokens] + memory[0][:, None, None] * table[3], state, None)
    for hypothesis in beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(beams, 15, block_trigrams=True)):
        assert not repeats(hypothesis.tokens)


@pytest.mark.parametrize("beams", [1, 4])
def test_blocking_forces_eos_which_is_never_blocked(beams):
    decoder = repetitive_decoder()
    assert beam_search(decoder, grids(0), BeamOptions(1, 9))[0].tokens == [4] * 9
    (hypothesis,) = beam_search(decoder, grids(0), BeamOptions(beams, 9, 1.0, block_trigrams=True))
    assert hypothesis.tokens == [4, 4, 4]
    assert hypothesis.log_prob == pytest.approx(-30.0, abs=1e-3)


def test_trigrams_may_share_two_tokens():
    table = torch.full((7, 7), -9.0)
    for a, b in ((BOS, 4), (4, 5), (5, 4)):
        table[a, b] = 9.0
    table[5, 6] = 1.0  # after 4 5 4 5, the second 4 is blocked
    table[6, EOS] = 9.0
    assert beam_search(ChainDecoder(table), grids(0), BeamOptions(1, 9, block_trigrams=True))[0].tokens == [
        4,
        5,
        4,
        5,
        6,
    ]
