"""Decoding as configured."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gridcap.common.config import CaptionConfig
from gridcap.train.data.vocabulary import BOS
from gridcap.train.decoding.beam import BeamOptions, beam_search
from gridcap.train.decoding.generate import generate_captions, generate_nbest
from gridcap.train.decoding.mbr import mean_similarity
from tests.train.decoding.table_decoders import (
    MAX_LENGTH,
    SEEDS,
    SOME,
    TableDecoder,
    V,
    code_of,
    grids,
    log_prob,
    random_chain,
    random_decoder,
    repeats,
    repetitive_decoder,
    seeded,
)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("block", [False, True])
def test_all_beam_settings_are_applied(beams, block):
    decoder = random_chain(3, end=-3.0)
    settings = CaptionConfig(beam_size=beams, max_length=11, length_penalty=0.3, block_trigrams=block)
    hypotheses = generate_captions(decoder, grids(0, 0), settings)
    assert hypotheses == beam_search(decoder, grids(0, 0), BeamOptions(beams, 11, 0.3, block))
    assert repeats(hypotheses[0].tokens) != block, "the setting has an effect"


def test_mbr_reorders_hypotheses_by_mean_similarity():
    settings = CaptionConfig(beam_size=6, max_length=11, mbr=True)
    changed = 0
    for seed in range(10):
        decoder = random_chain(seed, tokens=5)
        by_probability = generate_nbest(decoder, grids(0, 1), settings.model_copy(update={"mbr": False}))
        reranked = generate_nbest(decoder, grids(0, 1), settings)
        for before, after in zip(by_probability, reranked, strict=True):
            assert sorted(h.tokens for h in before) == sorted(h.tokens for h in after)
            assert (np.diff(mean_similarity([h.tokens for h in after])) <= 1e-12).all()
        assert generate_captions(decoder, grids(0, 1), settings) == [image[0] for image in reranked]
        changed += reranked != by_probability
    assert changed > 3, "the setting has an effect"


def test_mbr_compares_units_of_the_text_rather_than_tokens():
    settings = CaptionConfig(beam_size=6, max_length=11, mbr=True)
    halves = lambda tokens: [token // 2 for token in tokens]  # noqa: E731
    changed = 0
    for seed in range(5):
        decoder = random_chain(seed, tokens=8)
        (reranked,) = generate_nbest(decoder, grids(0), settings, to_units=halves)
        assert (np.diff(mean_similarity([halves(h.tokens) for h in reranked])) <= 1e-12).all()
        changed += reranked[0] != generate_captions(decoder, grids(0), settings)[0]
    assert changed, "the units have an effect"


SAMPLE = CaptionConfig(decoding="sample", max_length=MAX_LENGTH)


def as_values(hypotheses):
    return [(h.tokens, pytest.approx(h.log_prob, abs=1e-5), h.attention.tolist()) for h in hypotheses]


@SOME
@given(SEEDS, st.sampled_from([1, 2, 3]))
def test_samples_do_not_depend_on_batch_size_with_a_shared_generator(seed, size):
    decoder, order = random_decoder(seed), (2, 0, 3, 1, 2, 0, 0)
    whole = generate_captions(decoder, grids(*order), SAMPLE, seeded(seed))
    generator, parts = seeded(seed), []
    for start in range(0, len(order), size):
        parts += generate_captions(decoder, grids(*order[start : start + size]), SAMPLE, generator)
    assert as_values(parts) == as_values(whole)


def test_sampled_captions_depend_on_the_seed():
    decoder, images = random_decoder(4), grids(*[0] * 20)
    first, again, other = (generate_captions(decoder, images, SAMPLE, seeded(seed)) for seed in (1, 1, 2))
    assert as_values(first) == as_values(again)
    assert [h.tokens for h in first] != [h.tokens for h in other]
    assert len({tuple(h.tokens) for h in first}) > 3, "images are sampled independently"


@SOME
@given(SEEDS, st.sampled_from([{}, {"temperature": 3.0}, {"top_k": 2}, {"top_p": 0.5}]), st.sampled_from([-2.0, 0.0]))
def test_sampled_hypotheses_have_untruncated_log_prob_and_attention_of_their_prefix(seed, options, end):
    decoder, order = random_decoder(seed, end=end), (3, 1, 0)
    settings = SAMPLE.model_copy(update=options)
    for image, hypothesis in zip(order, generate_captions(decoder, grids(*order), settings, seeded(seed)), strict=True):
        possible = [log_prob(decoder, image, hypothesis.tokens, ended) for ended in (True, False)]
        if len(hypothesis.tokens) < MAX_LENGTH:
            possible.pop()
        assert any(hypothesis.log_prob == pytest.approx(value, abs=1e-4) for value in possible)
        assert hypothesis.attention.dtype == np.float32
        assert hypothesis.attention.shape == (len(hypothesis.tokens), 2)
        for i, (history, attended) in enumerate(hypothesis.attention):
            assert attended == image
            assert history == code_of([BOS, *hypothesis.tokens[:i]])


def test_sampling_without_attention_returns_none_and_runs_each_step_once():
    decoder = repetitive_decoder()
    (hypothesis,) = generate_captions(decoder, grids(0), CaptionConfig(decoding="sample", max_length=6))
    assert hypothesis.tokens == [4] * 6
    assert hypothesis.attention is None
    assert decoder.steps == 7


# --- packed weights on CPUs ---


class LinearDecoder(TableDecoder):
    """Decoder with a linear layer; records whether its weights were packed."""

    def __init__(self):
        super().__init__(None)
        self.output = torch.nn.Linear(1, V)
        self.was_packed = []

    def step(self, tokens, state, memory):
        self.was_packed.append("forward" in vars(self.output))
        return self.output(tokens[..., None].float()), state, None


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch was built without oneDNN's operators"
)
@pytest.mark.parametrize("decoding", ["beam", "sample"])
def test_decoding_packs_the_weights_temporarily(decoding):
    decoder = LinearDecoder().eval()
    generate_captions(decoder, torch.zeros(4, 1, 1), CaptionConfig(decoding=decoding, beam_size=2, max_length=3))
    assert decoder.was_packed
    assert all(decoder.was_packed)
    assert "forward" not in vars(decoder.output)


@SOME
@given(SEEDS, st.sampled_from([{"temperature": 1e-5}, {"temperature": 1e-300}, {"top_k": 1}, {"top_p": 1e-6}]))
def test_narrowest_sampling_equals_greedy_decoding(seed, options):
    decoder, images = random_decoder(seed), grids(0, 1, 2, 3)
    settings = CaptionConfig(decoding="sample", max_length=MAX_LENGTH, **options)
    greedy = beam_search(decoder, images, BeamOptions(1, MAX_LENGTH))
    for hypothesis, expected in zip(generate_captions(decoder, images, settings), greedy, strict=True):
        assert hypothesis.tokens == expected.tokens
        assert hypothesis.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
        assert np.array_equal(hypothesis.attention, expected.attention)
