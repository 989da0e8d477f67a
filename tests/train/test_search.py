"""Beam search against a decoder whose transitions are a table: every answer can be worked out by brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.decoders.base import Decoder
from train.search import beam_search
from train.vocabulary import BOS, EOS, PAD, UNK

V = 7  # PAD, BOS, EOS, UNK and three words
WORDS = (4, 5, 6)
LONGEST = 3
EVERYTHING = 120  # more than all candidates of any step


def code_of(history):
    """One number for a history of tokens."""
    code = 0
    for token in history:
        code = code * V + token
    return code


class TableDecoder(Decoder):
    """logits = table[image, history]; attention is the pair (history, image). The grid holds the image's number."""

    def __init__(self, table, with_attention=True):
        super().__init__(blind=False)
        self.table = table
        self.with_attention = with_attention

    def _project(self, grid):
        return (grid[:, 0, 0].long(),)

    def initial_state(self, memory):
        return (torch.zeros(len(memory[0]), 1, dtype=torch.int64),)

    def step(self, tokens, state, memory):
        histories = state[0] * V + tokens
        image = memory[0][:, None].expand_as(histories)
        attention = torch.stack([histories, image], -1).float() if self.with_attention else None
        return self.table[image, histories], (histories,), attention

    def forward(self, memory, tokens):
        raise NotImplementedError


def random_decoder(seed, images=4, end=0.0, **options):
    """A table of random logits; `end` is added to those of EOS."""
    table = torch.randn(images, V ** (LONGEST + 1), V, generator=torch.Generator().manual_seed(seed)) * 2
    table[..., EOS] += end
    return TableDecoder(table, **options)


def grids(*images):
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 2, 3).clone()


def log_prob(decoder, image, words, ended=True):
    log_probs = decoder.table[image].log_softmax(-1)
    history, total = [BOS], 0.0
    for token in [*words, *([EOS] if ended else [])]:
        total += log_probs[code_of(history), token].item()
        history.append(token)
    return total


def best_of_all(decoder, image, penalty):
    """The best ended caption of up to LONGEST words, by trying all."""
    captions = [list(c) for n in range(LONGEST + 1) for c in itertools.product(WORDS, repeat=n)]
    return max(captions, key=lambda words: log_prob(decoder, image, words) / max(1, len(words)) ** penalty)


def argmax_loop(decoder, image):
    words = []
    while len(words) < LONGEST:
        logits = decoder.table[image, code_of([BOS, *words])].clone()
        logits[[PAD, BOS, UNK]] = -torch.inf
        token = int(logits.argmax())
        if token == EOS:
            break
        words.append(token)
    return words


SEEDS = st.integers(0, 100_000)
SOME = settings(max_examples=25, deadline=None)


@SOME
@given(SEEDS, st.sampled_from([-1.0, 0.0, 1.0]))
def test_one_beam_equals_an_argmax_loop(seed, end):
    decoder = random_decoder(seed, end=end)
    found = beam_search(decoder, grids(0, 1, 2, 3), 1, LONGEST)
    assert [h.tokens for h in found] == [argmax_loop(decoder, image) for image in range(4)]


@SOME
@given(SEEDS, st.sampled_from([0.0, 1.0]), st.sampled_from([-2.0, 0.0]))
def test_enough_beams_equal_brute_force_over_all_captions(seed, penalty, end):
    decoder = random_decoder(seed, end=end)
    found = beam_search(decoder, grids(0, 1, 2, 3), EVERYTHING, LONGEST, penalty)
    for image, hypothesis in enumerate(found):
        assert hypothesis.tokens == best_of_all(decoder, image, penalty)
        assert hypothesis.log_prob == pytest.approx(log_prob(decoder, image, hypothesis.tokens), abs=1e-4)


def test_length_penalty_favours_longer_captions():
    table = torch.full((1, V ** (LONGEST + 1), V), -50.0)
    table[0, code_of([BOS])] = torch.tensor([-50, -50, 0.55, -50, 0.45, -50, -50]).clamp_min(1e-20).log()
    table[0, code_of([BOS, 4]), 5] = 0.0
    table[0, code_of([BOS, 4, 5]), EOS] = 0.0
    decoder = TableDecoder(table)
    short, long = (beam_search(decoder, grids(0), 3, LONGEST, penalty)[0].tokens for penalty in (0.0, 1.0))
    assert (short, long) == ([], [4, 5])


@SOME
@given(SEEDS, st.integers(1, 5))
def test_pad_bos_and_unk_are_never_written(seed, beams):
    decoder = random_decoder(seed)
    decoder.table[..., [PAD, BOS, UNK]] += 20
    for hypothesis in beam_search(decoder, grids(0, 1, 2, 3), beams, LONGEST):
        assert set(hypothesis.tokens) <= set(WORDS)


@SOME
@given(SEEDS, st.integers(1, 4), st.sampled_from([0.0, 0.7]), st.sampled_from([-1.0, 0.0, 2.0]))
def test_a_batch_gives_the_same_as_one_image_at_a_time(seed, beams, penalty, end):
    decoder = random_decoder(seed, end=end)
    order = (2, 0, 3, 1, 2)
    together = beam_search(decoder, grids(*order), beams, LONGEST, penalty)
    alone = [beam_search(decoder, grids(image), beams, LONGEST, penalty)[0] for image in order]
    for a, b in zip(together, alone, strict=True):
        assert a.tokens == b.tokens
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-5)
        if a.tokens:
            assert np.array_equal(a.attention, b.attention)


@SOME
@given(SEEDS, st.integers(1, 5), st.sampled_from([-100.0, 0.0]))
def test_log_probability_is_that_of_the_words_with_eos_if_it_ended(seed, beams, end):
    decoder = random_decoder(seed, end=end)
    for image, found in enumerate(beam_search(decoder, grids(0, 1, 2, 3), beams, LONGEST)):
        possible = [log_prob(decoder, image, found.tokens, ended) for ended in (True, False)]
        if len(found.tokens) < LONGEST:
            possible.pop()
        assert any(found.log_prob == pytest.approx(value, abs=1e-4) for value in possible)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_without_an_end_the_best_unended_hypothesis_of_max_length_is_taken(beams):
    decoder = random_decoder(0)
    decoder.table[..., EOS] = -torch.inf
    for longest in (1, 2, LONGEST):
        for image, found in enumerate(beam_search(decoder, grids(0, 1, 2, 3), beams, longest)):
            assert len(found.tokens) == longest
            assert found.log_prob == pytest.approx(log_prob(decoder, image, found.tokens, ended=False), abs=1e-4)
            if beams == 1:
                assert found.tokens == argmax_loop(decoder, image)[:longest]


def test_an_ended_hypothesis_goes_before_an_unended_one():
    table = torch.zeros(1, V ** (LONGEST + 1), V)
    table[..., EOS] = -torch.inf
    table[0, code_of([BOS]), EOS] = 2.0
    assert beam_search(TableDecoder(table), grids(0), 2, LONGEST)[0].tokens == []


@SOME
@given(SEEDS, st.integers(1, 5))
def test_each_words_attention_is_of_the_history_before_it(seed, beams):
    decoder = random_decoder(seed, end=-2.0)
    order = (3, 1, 0)
    for image, found in zip(order, beam_search(decoder, grids(*order), beams, LONGEST), strict=True):
        if not found.tokens:
            continue
        assert found.attention.dtype == np.float32
        assert len(found.attention) == len(found.tokens)
        for i, (history, looked_at) in enumerate(found.attention):
            assert looked_at == image
            assert history == code_of([BOS, *found.tokens[:i]])


def test_a_decoder_without_attention_gives_none():
    decoder = random_decoder(0, with_attention=False)
    assert all(h.attention is None for h in beam_search(decoder, grids(0, 1), 2, LONGEST))


def test_more_beams_than_words_work():
    decoder = random_decoder(1)
    assert beam_search(decoder, grids(0), 50, LONGEST)[0].tokens == best_of_all(decoder, 0, 0.0)


def test_grids_are_projected_once():
    decoder = random_decoder(3)
    calls = []
    real = decoder._project
    decoder._project = lambda grid: (calls.append(grid.shape), real(grid))[1]
    beam_search(decoder, grids(0, 1, 2), 5, LONGEST)
    assert calls == [(3, 2, 3)]


def test_search_keeps_no_gradients():
    decoder = random_decoder(2)
    decoder.table.requires_grad_()
    assert isinstance(beam_search(decoder, grids(0), 2, LONGEST)[0].log_prob, float)
