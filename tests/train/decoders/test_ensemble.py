"""Ensemble of decoders."""

import copy

import pytest
import torch

from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.ensemble import Ensemble
from gridcap.train.decoders.lstm import LstmConfig
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.decoders.transformer import TransformerConfig
from gridcap.train.decoding.beam import BeamOptions, beam_search

torch.set_num_threads(1)

V, B, K, T, SHAPE = 11, 2, 3, 4, (2, 2, 8)
CONFIGS = {
    "lstm": LstmConfig(embed_size=6, hidden_size=10),
    "top-down": AttentionConfig(cell="top-down", embed_size=6, hidden_size=10, attention_size=7),
    "transformer": TransformerConfig(embed_size=8, heads=2, layers=2, feedforward_size=12),
}


def build(family, seed=0):
    torch.manual_seed(seed)
    decoder = build_decoder(CONFIGS[family], V, SHAPE).eval()
    with torch.no_grad():
        decoder.output.weight *= 10  # so that the members disagree
    return decoder


@pytest.fixture
def grid():
    return torch.randn(B, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens():
    return torch.randint(1, V, (B, K, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", CONFIGS)
def test_ensemble_of_identical_members_equals_one_member(family, grid, tokens):
    member = build(family)
    ensemble = Ensemble([member, copy.deepcopy(member)])
    logits, attention = ensemble(ensemble.encode(grid), tokens)
    alone, member_attention = member(member.encode(grid), tokens)
    torch.testing.assert_close(logits, alone.log_softmax(-1))
    assert (attention is None) == (member_attention is None) == (not ensemble.has_attention)
    if member_attention is not None:
        torch.testing.assert_close(attention, member_attention)


def test_probabilities_are_averaged(grid, tokens):
    members = [build(family, seed) for seed, family in enumerate(CONFIGS)]
    ensemble = Ensemble(members)
    logits, attention = ensemble(ensemble.encode(grid), tokens)
    results = [member(member.encode(grid), tokens) for member in members]
    mean = sum(own.softmax(-1) for own, _ in results) / 3
    torch.testing.assert_close(logits.exp(), mean)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(B, K, T))
    torch.testing.assert_close(attention, (results[1][1] + results[2][1]) / 2)


def test_attention_is_none_if_no_member_has_attention(grid, tokens):
    ensemble = Ensemble([build("lstm"), build("lstm", 1)])
    assert not ensemble.has_attention
    assert ensemble(ensemble.encode(grid), tokens)[1] is None


def test_zero_features_member_ignores_the_grid(grid, tokens):
    member = build_decoder(CONFIGS["lstm"].model_copy(update={"zero_features": True}), V, SHAPE).eval()
    ensemble = Ensemble([member])
    logits = [ensemble(ensemble.encode(part), tokens)[0] for part in (grid, grid + torch.arange(8))]
    assert torch.equal(*logits)


def test_beam_search_supports_ensembles(grid):
    member = build("transformer")
    ensemble = Ensemble([member, copy.deepcopy(member), copy.deepcopy(member)])
    one, three = (beam_search(decoder, grid, BeamOptions(3, 6)) for decoder in (member, ensemble))
    assert [hypothesis.tokens for hypothesis in one] == [hypothesis.tokens for hypothesis in three]
    mixed = beam_search(Ensemble([build(family) for family in CONFIGS]), grid, BeamOptions(3, 6))
    assert all(hypothesis.attention.shape == (len(hypothesis.tokens), 4) for hypothesis in mixed)


def test_empty_ensemble_raises():
    with pytest.raises(ValueError, match="at least one"):
        Ensemble([])
