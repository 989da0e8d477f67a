"""What `train.decoders.base.Decoder` promises, held by every family."""

import math

import pytest
import torch

from common.config import AttentionConfig, LstmConfig
from train.decoders.base import Decoder
from train.decoders.build import build_decoder
from train.vocabulary import PAD

V, B, K, T = 11, 3, 4, 5
CONFIGS = {
    "lstm": LstmConfig(embed_size=6, hidden_size=10, dropout=0.3),
    "attention": AttentionConfig(embed_size=6, hidden_size=10, attention_size=7, dropout=0.3),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def build(config, grid_shape=(2, 2, 8), seed=0, **changes) -> Decoder:
    torch.manual_seed(seed)
    return build_decoder(config.model_copy(update=changes), V, grid_shape).eval()


def grids(count=B, grid_shape=(2, 2, 8), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, math.prod(grid_shape[:-1]), grid_shape[-1], generator=generator) * 3


def tokens(*shape, seed=2):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def run_steps(decoder, memory, given):
    """T calls of `step`: (B, K, T, V) logits and the attentions."""
    state = tuple(part.expand(*given.shape[:2], *part.shape[2:]) for part in decoder.initial_state(memory))
    logits, looks = [], []
    for t in range(given.shape[2]):
        out, state, attention = decoder.step(given[:, :, t], state, memory)
        logits.append(out)
        looks.append(attention)
    return torch.stack(logits, 2), looks


@pytest.mark.parametrize("grid_shape", [(2, 2, 8), (7, 7, 16), (1, 3, 5)])
def test_forward_equals_t_calls_of_step(config, grid_shape):
    decoder = build(config, grid_shape)
    memory = decoder.encode(grids(grid_shape=grid_shape))
    given = tokens(B, K, T)
    whole = decoder(memory, given)
    assert whole.shape == (B, K, T, V)
    torch.testing.assert_close(whole, run_steps(decoder, memory, given)[0], atol=1e-5, rtol=1e-5)


def test_initial_state_has_one_hypothesis_an_image(config):
    decoder = build(config)
    assert all(part.shape[:2] == (B, 1) for part in decoder.initial_state(decoder.encode(grids())))


def test_hypotheses_of_one_image_do_not_influence_each_other(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    other = given.clone()
    other[:, 1] = tokens(B, T, seed=9)
    assert not torch.equal(given[:, 1], other[:, 1])
    kept = [0, 2, 3]
    for run in (decoder, lambda m, g: run_steps(decoder, m, g)[0]):
        before, after = run(memory, given), run(memory, other)
        torch.testing.assert_close(before[:, kept], after[:, kept], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(before[:, 1], after[:, 1])


def test_images_of_one_batch_do_not_influence_each_other(config):
    decoder = build(config)
    given = tokens(B, K, T)
    together = decoder(decoder.encode(grids()), given)
    for i in range(B):
        alone = decoder(decoder.encode(grids()[i : i + 1]), given[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def test_logits_depend_on_the_past_only(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    other = given.clone()
    other[:, :, 3:] = other[:, :, 3:] % (V - 1) + 1
    before, after = decoder(memory, given), decoder(memory, other)
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])


def test_attention_sums_to_one_over_the_cells(config):
    decoder = build(config, (3, 2, 8))
    memory = decoder.encode(grids(grid_shape=(3, 2, 8)))
    _, looks = run_steps(decoder, memory, tokens(B, K, T))
    if isinstance(config, LstmConfig):
        assert looks == [None] * T
        return
    for attention in looks:
        assert attention.shape == (B, K, 6)
        assert (attention >= 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(B, K))


def test_output_depends_on_the_grid(config):
    decoder = build(config)
    given = tokens(B, K, T)
    a, b = (decoder(decoder.encode(grids(seed=seed)), given) for seed in (1, 2))
    assert not torch.allclose(a, b, atol=1e-3)


def test_a_blind_decoder_does_not_depend_on_the_grid(config):
    decoder = build(config, blind=True)
    given = tokens(B, K, T)
    a, b = (decoder(decoder.encode(grids(seed=seed)), given) for seed in (1, 2))
    assert torch.equal(a, b)


def test_attention_knows_where_a_cell_is():
    decoder = build(CONFIGS["attention"])
    given = tokens(B, K, T)
    here, there = (decoder(decoder.encode(part), given) for part in (grids(), grids().flip(1)))
    assert not torch.allclose(here, there, atol=1e-4)


def test_the_scale_of_the_encoder_hardly_matters(config):
    decoder = build(config)
    given = tokens(B, K, T)
    small, large = (decoder(decoder.encode(grids() * scale), given) for scale in (1, 100))
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)


def test_gradients_reach_every_parameter(config):
    decoder = build(config, dropout=0.0).train()
    given = tokens(B, K, T)
    decoder(decoder.encode(grids()), given).square().sum().backward()
    reached = {name: (p.grad != 0).float().mean().item() for name, p in decoder.named_parameters()}
    assert {name for name, share in reached.items() if share < 0.6} == set(), "most of every tensor, not a half of it"


def test_padding_has_an_embedding_that_is_never_trained(config):
    decoder = build(config).train()
    given = tokens(B, K, T)
    given[:, :, 2:] = PAD
    decoder(decoder.encode(grids()), given).sum().backward()
    assert not decoder.embedding.weight.grad[PAD].any()


def test_dropout_acts_in_training_and_not_in_evaluation(config):
    decoder = build(config)
    given = tokens(B, K, T)
    run = lambda: decoder(decoder.encode(grids()), given)  # noqa: E731
    assert torch.equal(run(), run())
    decoder.train()
    assert not torch.equal(run(), run())


def test_the_same_seed_builds_the_same_weights(config):
    a, b, other = build(config, seed=4), build(config, seed=4), build(config, seed=5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True))
