"""Search and sampling with decoders whose transitions are a table: every answer can be worked out by brute force."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcap.common.config import CaptionConfig
from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoding.base import mask_special_tokens, token_log_probs
from gridcap.train.decoding.beam import BeamOptions, beam_search, beam_search_nbest
from gridcap.train.decoding.generate import generate_captions, generate_nbest
from gridcap.train.decoding.mbr import mean_similarity
from gridcap.train.decoding.sampling import SamplingOptions, _choose, sample_tokens

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
        super().__init__(zero_features=False)
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


class ChainDecoder(Decoder):
    """logits = table[last token], for captions of any length; it counts its steps."""

    has_attention = False

    def __init__(self, table):
        super().__init__(zero_features=False)
        self.table = table
        self.steps = 0

    def _project(self, grid):
        return (grid,)

    def initial_state(self, memory):
        return (torch.zeros(len(memory[0]), 1),)

    def step(self, tokens, state, memory):
        self.steps += 1
        return self.table[tokens], state, None

    def forward(self, memory, tokens):
        raise NotImplementedError


def random_chain(seed, words=3, end=0.0):
    table = torch.randn(4 + words, 4 + words, generator=torch.Generator().manual_seed(seed)) * 2
    table[:, EOS] += end
    return ChainDecoder(table)


def random_decoder(seed, images=4, end=0.0, **options):
    """A table of random logits; `end` is added to those of EOS."""
    table = torch.randn(images, V ** (LONGEST + 1), V, generator=torch.Generator().manual_seed(seed)) * 2
    table[..., EOS] += end
    return TableDecoder(table, **options)


def grids(*images):
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 2, 3).clone()


def without_specials(logits):
    """Log-probabilities of the words and EOS alone."""
    allowed = [EOS, *range(4, logits.shape[-1])]
    log_probs = torch.full_like(logits, -torch.inf)
    log_probs[..., allowed] = logits[..., allowed].log_softmax(-1)
    return log_probs


def log_prob(decoder, image, words, ended=True):
    log_probs = without_specials(decoder.table[image])
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
    found = beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(1, LONGEST))
    assert [h.tokens for h in found] == [argmax_loop(decoder, image) for image in range(4)]


@SOME
@given(SEEDS, st.sampled_from([0.0, 1.0]), st.sampled_from([-2.0, 0.0]))
def test_enough_beams_equal_brute_force_over_all_captions(seed, penalty, end):
    decoder = random_decoder(seed, end=end)
    found = beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(EVERYTHING, LONGEST, penalty))
    for image, hypothesis in enumerate(found):
        assert hypothesis.tokens == best_of_all(decoder, image, penalty)
        assert hypothesis.log_prob == pytest.approx(log_prob(decoder, image, hypothesis.tokens), abs=1e-4)


@SOME
@given(SEEDS, st.sampled_from([0.0, 1.0]))
def test_alternatives_are_the_best_of_all_captions_in_their_order(seed, penalty):
    decoder = random_decoder(seed, images=2)
    captions = [list(c) for n in range(LONGEST + 1) for c in itertools.product(WORDS, repeat=n)]
    for image, found in enumerate(
        beam_search_nbest(decoder, grids(0, 1), BeamOptions(EVERYTHING, LONGEST, penalty), count=5)
    ):
        scores = {tuple(w): log_prob(decoder, image, w) / max(1, len(w)) ** penalty for w in captions}
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:5]
        assert [scores[tuple(h.tokens)] for h in found] == pytest.approx([scores[words] for words in best], abs=1e-4)


def test_length_penalty_favours_longer_captions():
    table = torch.full((1, V ** (LONGEST + 1), V), -50.0)
    table[0, code_of([BOS])] = torch.tensor([-50, -50, 0.55, -50, 0.45, -50, -50]).clamp_min(1e-20).log()
    table[0, code_of([BOS, 4]), 5] = 0.0
    table[0, code_of([BOS, 4, 5]), EOS] = 0.0
    decoder = TableDecoder(table)
    short, long = (beam_search(decoder, grids(0), BeamOptions(3, LONGEST, penalty))[0].tokens for penalty in (0.0, 1.0))
    assert (short, long) == ([], [4, 5])


@SOME
@given(SEEDS, st.integers(1, 5))
def test_pad_bos_and_unk_are_never_written(seed, beams):
    decoder = random_decoder(seed)
    decoder.table[..., [PAD, BOS, UNK]] += 20
    for hypothesis in beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(beams, LONGEST)):
        assert set(hypothesis.tokens) <= set(WORDS)


@SOME
@given(SEEDS, st.integers(1, 4), st.sampled_from([0.0, 0.7]), st.sampled_from([-1.0, 0.0, 2.0]))
def test_a_batch_gives_the_same_as_one_image_at_a_time(seed, beams, penalty, end):
    decoder = random_decoder(seed, end=end)
    order = (2, 0, 3, 1, 2)
    together = beam_search(decoder, grids(*order), BeamOptions(beams, LONGEST, penalty))
    alone = [beam_search(decoder, grids(image), BeamOptions(beams, LONGEST, penalty))[0] for image in order]
    for a, b in zip(together, alone, strict=True):
        assert a.tokens == b.tokens
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-5)
        if a.tokens:
            assert np.array_equal(a.attention, b.attention)


@SOME
@given(SEEDS, st.integers(1, 5), st.sampled_from([-100.0, 0.0]))
def test_log_probability_is_that_of_the_words_with_eos_if_it_ended(seed, beams, end):
    decoder = random_decoder(seed, end=end)
    for image, found in enumerate(beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(beams, LONGEST))):
        possible = [log_prob(decoder, image, found.tokens, ended) for ended in (True, False)]
        if len(found.tokens) < LONGEST:
            possible.pop()
        assert any(found.log_prob == pytest.approx(value, abs=1e-4) for value in possible)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_without_an_end_the_best_unended_hypothesis_of_max_length_is_taken(beams):
    decoder = random_decoder(0)
    decoder.table[..., EOS] = -torch.inf
    for longest in (1, 2, LONGEST):
        for image, found in enumerate(beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(beams, longest))):
            assert len(found.tokens) == longest
            assert found.log_prob == pytest.approx(log_prob(decoder, image, found.tokens, ended=False), abs=1e-4)
            if beams == 1:
                assert found.tokens == argmax_loop(decoder, image)[:longest]


def test_an_ended_hypothesis_goes_before_an_unended_one():
    table = torch.zeros(1, V ** (LONGEST + 1), V)
    table[..., EOS] = -torch.inf
    table[0, code_of([BOS]), EOS] = 2.0
    assert beam_search(TableDecoder(table), grids(0), BeamOptions(2, LONGEST))[0].tokens == []


@SOME
@given(SEEDS, st.integers(1, 5))
def test_each_words_attention_is_of_the_history_before_it(seed, beams):
    decoder = random_decoder(seed, end=-2.0)
    order = (3, 1, 0)
    for image, found in zip(order, beam_search(decoder, grids(*order), BeamOptions(beams, LONGEST)), strict=True):
        if not found.tokens:
            continue
        assert found.attention.dtype == np.float32
        assert len(found.attention) == len(found.tokens)
        for i, (history, looked_at) in enumerate(found.attention):
            assert looked_at == image
            assert history == code_of([BOS, *found.tokens[:i]])


def test_a_decoder_without_attention_gives_none():
    decoder = random_decoder(0, with_attention=False)
    assert all(h.attention is None for h in beam_search(decoder, grids(0, 1), BeamOptions(2, LONGEST)))


def test_more_beams_than_words_work():
    decoder = random_decoder(1)
    assert beam_search(decoder, grids(0), BeamOptions(50, LONGEST))[0].tokens == best_of_all(decoder, 0, 0.0)


def test_grids_are_projected_once():
    decoder = random_decoder(3)
    calls = []
    real = decoder._project
    decoder._project = lambda grid: (calls.append(grid.shape), real(grid))[1]
    beam_search(decoder, grids(0, 1, 2), BeamOptions(5, LONGEST))
    assert calls == [(3, 2, 3)]


def test_search_keeps_no_gradients():
    decoder = random_decoder(2)
    decoder.table.requires_grad_()
    assert isinstance(beam_search(decoder, grids(0), BeamOptions(2, LONGEST))[0].log_prob, float)


# ------------------------------------------------------------------------------------------------- blocked trigrams


def trigrams(words):
    return list(zip(words, words[1:], words[2:], strict=False))


def repeats(words):
    return len(set(trigrams(words))) < len(trigrams(words))


def chain_log_prob(decoder, words, ended=True):
    log_probs = without_specials(decoder.table)
    path = [BOS, *words, *([EOS] if ended else [])]
    return sum(log_probs[a, b].item() for a, b in itertools.pairwise(path))


def blocked_argmax_loop(decoder, longest):
    log_probs, words = without_specials(decoder.table), []
    for length in range(longest + 1):
        row = log_probs[words[-1] if words else BOS].clone()
        for token in range(4, len(row)):
            if repeats([*words, token]):
                row[token] = -torch.inf
        token = int(row.argmax())
        if token == EOS:
            return words, True
        if length < longest:
            words.append(token)
    return words, False


@SOME
@given(SEEDS, st.integers(1, 3), st.sampled_from([-4.0, -1.0]))
def test_one_blocked_beam_equals_a_loop_that_looks_for_repeated_trigrams(seed, words, end):
    decoder = random_chain(seed, words, end)
    wanted, ended = blocked_argmax_loop(decoder, 12)
    for found in beam_search(decoder, grids(0, 0), BeamOptions(1, 12, block_trigrams=True)):
        assert found.tokens == wanted
        assert found.log_prob == pytest.approx(chain_log_prob(decoder, wanted, ended), abs=1e-3)


@SOME
@given(SEEDS, st.sampled_from([0.0, 1.0]))
def test_enough_blocked_beams_equal_brute_force_over_all_captions_without_repeats(seed, penalty):
    decoder = random_chain(seed, words=2, end=-3.0)
    captions = [list(c) for n in range(8) for c in itertools.product((4, 5), repeat=n) if not repeats(c)]
    best = max(chain_log_prob(decoder, words) / max(1, len(words)) ** penalty for words in captions)
    (found,) = beam_search(decoder, grids(0), BeamOptions(300, 7, penalty, block_trigrams=True))
    assert not repeats(found.tokens)
    assert found.log_prob == pytest.approx(chain_log_prob(decoder, found.tokens), abs=1e-3)
    assert found.log_prob / max(1, len(found.tokens)) ** penalty == pytest.approx(best, abs=1e-3), "or one that ties"


@SOME
@given(SEEDS, st.integers(2, 5))
def test_no_beam_of_any_image_repeats_a_trigram(seed, beams):
    """Beams change places at every step, and their histories must go with them."""
    table = random_chain(seed, end=-3.0).table
    decoder = random_decoder(seed)
    decoder.step = lambda tokens, state, memory: (table[tokens] + memory[0][:, None, None] * table[3], state, None)
    for found in beam_search(decoder, grids(0, 1, 2, 3), BeamOptions(beams, 15, block_trigrams=True)):
        assert not repeats(found.tokens)


def lover_of_one_word():
    """Always the only word; EOS is never likely."""
    table = torch.zeros(5, 5)
    table[:, EOS] = -30.0
    return ChainDecoder(table)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_decoder_that_loves_to_repeat_is_stopped_by_eos_which_is_never_blocked(beams):
    decoder = lover_of_one_word()
    assert beam_search(decoder, grids(0), BeamOptions(1, 9))[0].tokens == [4] * 9
    (found,) = beam_search(decoder, grids(0), BeamOptions(beams, 9, 1.0, block_trigrams=True))
    assert found.tokens == [4, 4, 4]
    assert found.log_prob == pytest.approx(-30.0, abs=1e-3)


def test_a_trigram_may_share_two_words_with_an_earlier_one():
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


# --------------------------------------------------------------------------------------------- log-probabilities


def test_word_log_probs_are_those_of_the_words_and_eos_alone():
    logits = torch.randn(2, 3, 4, V, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    found = token_log_probs(logits)
    assert torch.equal(logits, before), "the logits are the caller's"
    assert torch.allclose(found, without_specials(logits), atol=1e-6)
    assert torch.isneginf(found[..., [PAD, BOS, UNK]]).all()
    assert torch.allclose(found.exp().sum(-1), torch.ones(2, 3, 4))


def test_word_log_probs_are_float32_whatever_the_logits_are():
    logits = torch.tensor([0.0, 0.0, 10.0, 0.0, 3.0, 0.01, -7.0])
    found = token_log_probs(logits.bfloat16())
    assert found.dtype == torch.float32
    assert torch.allclose(found, without_specials(logits.bfloat16().float()), atol=1e-6)
    assert mask_special_tokens(logits.bfloat16()).dtype == torch.float32


def test_word_log_probs_give_finite_gradients_that_stay_away_from_what_is_never_written():
    logits = torch.randn(2, 3, 4, V, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.tensor([4, 5, EOS, PAD]).expand(2, 3, 4)
    picked = token_log_probs(logits).gather(-1, targets[..., None])[..., 0].masked_fill(targets == PAD, 0.0)
    picked.sum().backward()
    assert torch.isfinite(picked).all()
    assert torch.isfinite(logits.grad).all()
    probs = without_specials(logits.detach()).exp()
    wanted = torch.nn.functional.one_hot(targets, V) - probs
    wanted[:, :, 3] = 0
    assert torch.allclose(logits.grad, wanted, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ sampling


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(decoder, images, samples, longest=LONGEST, seed=0, **options):
    return sample_tokens(
        decoder, decoder.encode(grids(*images)), samples, SamplingOptions(longest, **options), generator=seeded(seed)
    )


def drawn_from(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw a token from, the plain way: a token at a time."""
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
    """Row of `sample_tokens` without its padding -> its probability, over all that can be drawn."""
    found, unended = {}, {(): 1.0}
    for length in range(LONGEST + 1):
        longer = {}
        for words, chance in unended.items():
            logits = decoder.table[image, code_of([BOS, *words])]
            for token, part in drawn_from(logits, **options).items():
                if token == EOS:
                    found[(*words, EOS)] = chance * part
                elif length == LONGEST:
                    found[words] = found.get(words, 0.0) + chance * part
                else:
                    longer[(*words, token)] = chance * part
        unended = longer
    return found


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
def test_captions_come_as_often_as_their_probability_says(options):
    decoder, count = random_decoder(7, end=0.5), 20_000
    rows = draw(decoder, (0, 1), count, **options)
    assert rows.shape == (2, count, LONGEST + 1)
    for image in (0, 1):
        wanted = distribution(decoder, image, **options)
        assert sum(wanted.values()) == pytest.approx(1)
        counts = Counter(tuple(t for t in row if t != PAD) for row in rows[image].tolist())
        assert set(counts) <= set(wanted), "what has no probability is never drawn"
        for words, chance in wanted.items():
            spread = (count * chance * (1 - chance)) ** 0.5
            assert abs(counts[words] - count * chance) < 5 * spread + 3


@SOME
@given(SEEDS, st.sampled_from([{"temperature": 1e-5}, {"temperature": 1e-300}, {"top_k": 1}, {"top_p": 1e-6}]))
def test_the_narrowest_sampling_equals_greedy_search(seed, options):
    decoder, images = random_decoder(seed), grids(0, 1, 2, 3)
    settings = CaptionConfig(decoding="sample", max_length=LONGEST, **options)
    greedy = beam_search(decoder, images, BeamOptions(1, LONGEST))
    for found, wanted in zip(generate_captions(decoder, images, settings), greedy, strict=True):
        assert found.tokens == wanted.tokens
        assert found.log_prob == pytest.approx(wanted.log_prob, abs=1e-4)
        assert np.array_equal(found.attention, wanted.attention)


def first_words(probabilities, **options):
    """Which words are drawn, of these probabilities of the words from 4 on."""
    table = torch.full((4 + len(probabilities),) * 2, -torch.inf)
    table[:, 4:] = torch.tensor(probabilities).log()
    return set(draw(ChainDecoder(table), (0,), 3000, 1, **options).unique().tolist())


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
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    assert first_words([0.3, 0.05, 0.5, 0.15], top_p=top_p) == kept


@pytest.mark.parametrize(("top_k", "kept"), [(1, {6}), (2, {4, 5, 6}), (3, {4, 5, 6}), (4, {4, 5, 6, 7}), (99, None)])
def test_top_k_keeps_all_that_tie_with_the_last(top_k, kept):
    assert first_words([0.25, 0.25, 0.4, 0.1], top_k=top_k) == (kept or {4, 5, 6, 7})


def test_top_p_is_of_what_temperature_and_top_k_leave():
    assert first_words([0.4, 0.3, 0.3], top_p=0.5) == {4, 5}
    assert first_words([0.4, 0.3, 0.3], top_p=0.5, temperature=0.1) == {4}
    assert first_words([0.5, 0.2, 0.15, 0.15], top_p=0.7, top_k=2) == {4}  # 0.5 of 0.7 is more than 0.7


@SOME
@given(SEEDS, st.sampled_from([-3.0, 0.0, 2.0]), st.integers(1, 6))
def test_rows_are_words_then_eos_then_padding_and_no_longer_than_needed(seed, end, samples):
    rows = draw(random_decoder(seed, end=end), (0, 1, 2, 3), samples, seed=seed)
    assert rows.dtype == torch.int64
    assert (rows != PAD).any(-1).all()
    assert (rows[..., -1] != PAD).any(), "the last column is somebody's"
    for row in rows.flatten(0, 1).tolist():
        words = list(itertools.takewhile(lambda t: t in WORDS, row))
        after = row[len(words) :]
        assert len(words) <= LONGEST
        if len(words) < LONGEST or after:
            assert after in ([EOS] + [PAD] * (len(after) - 1), [PAD] * len(after))
        if PAD in after and EOS not in after:
            assert len(words) == LONGEST, "only a cut caption has no EOS"


@pytest.mark.parametrize("longest", [1, 2, LONGEST])
def test_a_caption_that_does_not_end_is_cut_and_has_no_eos(longest):
    decoder = random_decoder(0)
    decoder.table[..., EOS] = -torch.inf
    rows = draw(decoder, (0, 1), 4, longest)
    assert rows.shape == (2, 4, longest)
    assert set(rows.unique().tolist()) <= set(WORDS)


def test_sampling_stops_when_all_have_ended():
    table = torch.full((5, 5), -torch.inf)
    table[BOS, 4] = table[4, EOS] = 0.0
    decoder = ChainDecoder(table)
    assert draw(decoder, (0, 0), 3, 30).tolist() == [[[4, EOS]] * 3] * 2
    assert decoder.steps == 2


@SOME
@given(SEEDS)
def test_what_is_never_written_is_never_drawn(seed):
    decoder = random_decoder(seed)
    decoder.table[..., [PAD, BOS, UNK]] += 50
    rows = draw(decoder, (0, 1, 2, 3), 50)
    assert not ((rows == BOS) | (rows == UNK)).any()
    assert (rows[..., 0] != PAD).all()


def test_the_seed_decides():
    decoder = random_decoder(5, end=-2.0)
    first, again, other = (draw(decoder, (0, 1), 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert len({tuple(row) for row in first[0].tolist()}) > 5, "an image's samples are drawn apart"


def test_an_ended_caption_leaves_the_others_alone():
    decoder = random_decoder(5, end=-2.0)
    before = draw(decoder, (0, 1), 20)
    decoder.table[1, :, EOS] += 100
    after = draw(decoder, (0, 1), 20)
    assert (after[1, :, 0] == EOS).all()
    assert [[t for t in row if t != PAD] for row in after[0].tolist()] == [
        [t for t in row if t != PAD] for row in before[0].tolist()
    ]


def test_drawn_tokens_may_go_into_training_and_hold_no_gradients():
    decoder = random_decoder(2)
    decoder.table.requires_grad_()
    real, with_gradient = decoder.step, []
    decoder.step = lambda *given: (with_gradient.append(torch.is_grad_enabled()), real(*given))[1]
    rows = draw(decoder, (0, 1), 3)
    assert not any(with_gradient)
    assert not rows.is_inference()
    embedding = torch.nn.Embedding(V, 2)
    embedding(rows).sum().backward()
    assert torch.isfinite(embedding.weight.grad).all()


@pytest.mark.parametrize(
    ("noise", "token"), [(0, 2), (2**29 - 1, 2), (2**29, 4), (2**30 - 1, 4), (2**30, 5), (2**31 - 1, 5)]
)
def test_at_the_very_edges_nothing_is_drawn_that_has_no_probability(noise, token):
    probs = torch.tensor([[[0.0, 0.0, 0.25, 0.0, 0.25, 0.5, 0.0]]])
    assert _choose(probs, torch.tensor([[noise]])).item() == token
    assert _choose(probs * 0.375, torch.tensor([[noise]])).item() == token, "up to a factor"


def test_a_decoder_that_gives_nan_draws_tokens_that_exist():
    rows = draw(ChainDecoder(torch.full((6, 6), torch.nan)), (0,), 5, 4)
    assert ((rows >= 0) & (rows < 6)).all()


# --------------------------------------------------------------------------------------------------- one entry point


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("block", [False, True])
def test_beam_search_gets_all_its_settings(beams, block):
    decoder = random_chain(3, end=-3.0)
    settings = CaptionConfig(beam_size=beams, max_length=11, length_penalty=0.3, block_trigrams=block)
    found = generate_captions(decoder, grids(0, 0), settings)
    assert found == beam_search(decoder, grids(0, 0), BeamOptions(beams, 11, 0.3, block))
    assert repeats(found[0].tokens) != block, "the settings must matter"


def test_consensus_takes_the_hypothesis_most_like_the_others_and_keeps_all():
    settings = CaptionConfig(beam_size=6, max_length=11, mbr=True)
    changed = 0
    for seed in range(10):
        decoder = random_chain(seed, words=5)
        likeliest = generate_nbest(decoder, grids(0, 1), settings.model_copy(update={"mbr": False}))
        agreed = generate_nbest(decoder, grids(0, 1), settings)
        for before, after in zip(likeliest, agreed, strict=True):
            assert sorted(h.tokens for h in before) == sorted(h.tokens for h in after)
            assert (np.diff(mean_similarity([h.tokens for h in after])) <= 1e-12).all()
        assert generate_captions(decoder, grids(0, 1), settings) == [image[0] for image in agreed]
        changed += agreed != likeliest
    assert changed > 3, "the setting must matter"


SAMPLE = CaptionConfig(decoding="sample", max_length=LONGEST)


def as_values(found):
    return [(h.tokens, pytest.approx(h.log_prob, abs=1e-5), h.attention.tolist()) for h in found]


@SOME
@given(SEEDS, st.sampled_from([1, 2, 3]))
def test_one_generator_for_all_batches_gives_the_same_captions_whatever_their_size(seed, size):
    decoder, order = random_decoder(seed), (2, 0, 3, 1, 2, 0, 0)
    together = generate_captions(decoder, grids(*order), SAMPLE, seeded(seed))
    generator, parts = seeded(seed), []
    for start in range(0, len(order), size):
        parts += generate_captions(decoder, grids(*order[start : start + size]), SAMPLE, generator)
    assert as_values(parts) == as_values(together)


def test_another_seed_samples_other_captions():
    decoder, images = random_decoder(4), grids(*[0] * 20)
    first, again, other = (generate_captions(decoder, images, SAMPLE, seeded(seed)) for seed in (1, 1, 2))
    assert as_values(first) == as_values(again)
    assert [h.tokens for h in first] != [h.tokens for h in other]
    assert len({tuple(h.tokens) for h in first}) > 3, "images are drawn apart"


@SOME
@given(SEEDS, st.sampled_from([{}, {"temperature": 3.0}, {"top_k": 2}, {"top_p": 0.5}]), st.sampled_from([-2.0, 0.0]))
def test_a_sampled_captions_log_prob_is_the_decoders_own_and_its_attention_of_the_words_before(seed, options, end):
    decoder, order = random_decoder(seed, end=end), (3, 1, 0)
    settings = SAMPLE.model_copy(update=options)
    for image, found in zip(order, generate_captions(decoder, grids(*order), settings, seeded(seed)), strict=True):
        possible = [log_prob(decoder, image, found.tokens, ended) for ended in (True, False)]
        if len(found.tokens) < LONGEST:
            possible.pop()
        assert any(found.log_prob == pytest.approx(value, abs=1e-4) for value in possible)
        assert found.attention.dtype == np.float32
        assert found.attention.shape == (len(found.tokens), 2)
        for i, (history, looked_at) in enumerate(found.attention):
            assert looked_at == image
            assert history == code_of([BOS, *found.tokens[:i]])


def test_sampling_from_a_decoder_without_attention_gives_none_and_makes_each_step_once():
    decoder = lover_of_one_word()
    (found,) = generate_captions(decoder, grids(0), CaptionConfig(decoding="sample", max_length=6))
    assert found.tokens == [4] * 6
    assert found.attention is None
    assert decoder.steps == 7


# --- on a CPU ---


class LinearDecoder(TableDecoder):
    """Words from a linear layer, which notes whether it was packed."""

    def __init__(self):
        super().__init__(None)
        self.output = torch.nn.Linear(1, V)
        self.was_packed = []

    def step(self, tokens, state, memory):
        self.was_packed.append("forward" in vars(self.output))
        return self.output(tokens[..., None].float()), state, None


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has not oneDNN's operators")
@pytest.mark.parametrize("search", ["beam", "sample"])
def test_a_search_of_several_captions_packs_its_weights_and_unpacks_them(search):
    decoder = LinearDecoder().eval()
    generate_captions(decoder, torch.zeros(4, 1, 1), CaptionConfig(decoding=search, beam_size=2, max_length=3))
    assert decoder.was_packed
    assert all(decoder.was_packed)
    assert "forward" not in vars(decoder.output)
