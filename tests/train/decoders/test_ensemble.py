"""Several decoders as one."""

import copy

import pytest
import torch

from gridcap.common.config import AttentionConfig, LstmConfig, TransformerConfig
from gridcap.train.decoders.build import build_decoder
from gridcap.train.decoders.ensemble import Ensemble
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
        decoder.output.weight *= 10  # so that the members are of different minds
    return decoder


@pytest.fixture
def grid():
    return torch.randn(B, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens():
    return torch.randint(1, V, (B, K, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", CONFIGS)
def test_two_equal_members_are_one(family, grid, tokens):
    member = build(family)
    ensemble = Ensemble([member, copy.deepcopy(member)])
    logits, attention = ensemble(ensemble.encode(grid), tokens)
    alone, look = member(member.encode(grid), tokens)
    torch.testing.assert_close(logits, alone.log_softmax(-1))
    assert (attention is None) == (look is None) == (not ensemble.has_attention)
    if look is not None:
        torch.testing.assert_close(attention, look)


def test_the_members_probabilities_are_averaged(grid, tokens):
    members = [build(family, seed) for seed, family in enumerate(CONFIGS)]
    ensemble = Ensemble(members)
    logits, attention = ensemble(ensemble.encode(grid), tokens)
    results = [member(member.encode(grid), tokens) for member in members]
    mean = sum(own.softmax(-1) for own, _ in results) / 3
    torch.testing.assert_close(logits.exp(), mean)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(B, K, T))
    torch.testing.assert_close(attention, (results[1][1] + results[2][1]) / 2)


def test_members_without_attention_give_none(grid, tokens):
    ensemble = Ensemble([build("lstm"), build("lstm", 1)])
    assert not ensemble.has_attention
    assert ensemble(ensemble.encode(grid), tokens)[1] is None


def test_a_blind_member_stays_blind(grid, tokens):
    blind = build_decoder(CONFIGS["lstm"].model_copy(update={"zero_features": True}), V, SHAPE).eval()
    ensemble = Ensemble([blind])
    logits = [ensemble(ensemble.encode(part), tokens)[0] for part in (grid, grid + torch.arange(8))]
    assert torch.equal(*logits)


def test_searches_like_any_decoder(grid):
    member = build("transformer")
    ensemble = Ensemble([member, copy.deepcopy(member), copy.deepcopy(member)])
    one, three = (beam_search(decoder, grid, BeamOptions(3, 6)) for decoder in (member, ensemble))
    assert [found.tokens for found in one] == [found.tokens for found in three]
    mixed = beam_search(Ensemble([build(family) for family in CONFIGS]), grid, BeamOptions(3, 6))
    assert all(found.attention.shape == (len(found.tokens), 4) for found in mixed)


def test_needs_a_member():
    with pytest.raises(ValueError, match="at least one"):
        Ensemble([])
