"""What `train.decoders.base.Decoder` promises, held by every family and every layout of each."""

import math

import pytest
import torch

from gridcap.common.config import AttentionConfig, LstmConfig, TransformerConfig
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.build import build_decoder
from gridcap.train.decoders.ensemble import Ensemble

torch.set_num_threads(1)

V, B, K, T = 11, 3, 4, 5


def lstm(**options) -> LstmConfig:
    return LstmConfig(**{"embed_size": 6, "hidden_size": 10, "dropout": 0.3} | options)


def attention(**options) -> AttentionConfig:
    return AttentionConfig(**{"embed_size": 6, "hidden_size": 10, "attention_size": 7, "dropout": 0.3} | options)


def transformer(**options) -> TransformerConfig:
    small = {"embed_size": 8, "layers": 2, "heads": 2, "feedforward_size": 12, "dropout": 0.3}
    return TransformerConfig(**small | options)


CONFIGS = {
    **{f"lstm {image}": lstm(image_injection=image) for image in ("initial-state", "first-input", "every-step")},
    **{
        f"lstm {image}, bottlenecks": lstm(image_injection=image, image_bottleneck=7, output_bottleneck=5)
        for image in ("initial-state", "first-input", "every-step")
    },
    "lstm, image bottleneck": lstm(image_bottleneck=7),
    "lstm, output bottleneck": lstm(output_bottleneck=5),
    **{
        f"{cell}, {output}{', gate' if gate else ''}": attention(cell=cell, output_layer=output, context_gate=gate)
        for cell in ("gru", "lstm", "att2in", "top-down")
        for output in ("hidden", "deep")
        for gate in (False, True)
    },
    "transformer": transformer(),
    "transformer, one layer": transformer(layers=1, heads=4),
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


def logits_of(decoder, memory, given):
    return decoder(memory, given)[0]


def run_steps(decoder, memory, given):
    """T calls of `step`: (B, K, T, V) logits, and (B, K, T, P) attention or None."""
    state = tuple(part.expand(*given.shape[:2], *part.shape[2:]) for part in decoder.initial_state(memory))
    logits, looks = [], []
    for t in range(given.shape[2]):
        out, state, look = decoder.step(given[:, :, t], state, memory)
        logits.append(out)
        looks.append(look)
    return torch.stack(logits, 2), None if looks[0] is None else torch.stack(looks, 2)


@pytest.mark.parametrize("grid_shape", [(2, 2, 8), (7, 7, 16), (1, 3, 5)])
def test_forward_equals_t_calls_of_step(config, grid_shape):
    decoder = build(config, grid_shape)
    memory = decoder.encode(grids(grid_shape=grid_shape))
    given = tokens(B, K, T)
    (whole, look), (steps, step_look) = decoder(memory, given), run_steps(decoder, memory, given)
    assert whole.shape == (B, K, T, V)
    torch.testing.assert_close(whole, steps, atol=1e-5, rtol=1e-5)
    if decoder.has_attention:
        assert look.shape == (B, K, T, math.prod(grid_shape[:-1]))
        torch.testing.assert_close(look, step_look, atol=1e-5, rtol=1e-5)
    else:
        assert look is None
        assert step_look is None


@pytest.mark.parametrize("length", [1, 40])
def test_captions_may_have_any_length(config, length):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, length)
    torch.testing.assert_close(decoder(memory, given)[0], run_steps(decoder, memory, given)[0], atol=1e-5, rtol=1e-5)


def test_initial_state_has_one_hypothesis_an_image(config):
    decoder = build(config)
    assert all(part.shape[:2] == (B, 1) for part in decoder.initial_state(decoder.encode(grids())))


def test_the_memory_has_an_image_in_each_row(config):
    memory = build(config).encode(grids())
    assert all(len(part) == B for part in memory)


def test_search_may_reorder_the_state(config):
    """After a gather over K the decoder goes on as if the chosen hypotheses had been read from the start."""
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    chosen = torch.tensor([[3, 3, 0, 1], [0, 2, 1, 2], [1, 1, 1, 1]])
    state = tuple(part.expand(B, K, *part.shape[2:]) for part in decoder.initial_state(memory))
    for t in range(T - 2):
        _, state, _ = decoder.step(given[:, :, t], state, memory)
    state = tuple(part.gather(1, chosen.reshape(B, K, *(1,) * (part.dim() - 2)).expand_as(part)) for part in state)
    past = given[:, :, : T - 2].gather(1, chosen[..., None].expand(-1, -1, T - 2))
    whole, _ = decoder(memory, torch.cat([past, given[:, :, T - 2 :]], 2))
    for t in range(T - 2, T):
        logits, state, _ = decoder.step(given[:, :, t], state, memory)
        torch.testing.assert_close(logits, whole[:, :, t], atol=1e-5, rtol=1e-5)


def test_hypotheses_of_one_image_do_not_influence_each_other(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    other = given.clone()
    other[:, 1] = tokens(B, T, seed=9)
    assert not torch.equal(given[:, 1], other[:, 1])
    kept = [0, 2, 3]
    for run in (decoder, lambda m, g: run_steps(decoder, m, g)):
        before, after = run(memory, given)[0], run(memory, other)[0]
        torch.testing.assert_close(before[:, kept], after[:, kept], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(before[:, 1], after[:, 1])


def test_images_of_one_batch_do_not_influence_each_other(config):
    decoder = build(config)
    given = tokens(B, K, T)
    together, looks = decoder(decoder.encode(grids()), given)
    for i in range(B):
        alone, look = decoder(decoder.encode(grids()[i : i + 1]), given[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        if looks is not None:
            torch.testing.assert_close(look[0], looks[i], atol=1e-5, rtol=1e-5)


def test_logits_depend_on_the_past_only(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    other = given.clone()
    other[:, :, 3:] = other[:, :, 3:] % (V - 1) + 1
    before, after = logits_of(decoder, memory, given), logits_of(decoder, memory, other)
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])


def test_logits_depend_on_all_of_the_past(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    other = given.clone()
    other[:, :, 0] = other[:, :, 0] % (V - 1) + 1
    before, after = logits_of(decoder, memory, given), logits_of(decoder, memory, other)
    assert ((before - after).abs().amax(-1) > 1e-6).all()


def test_attention_sums_to_one_over_the_cells(config):
    decoder = build(config, (3, 2, 8))
    _, look = decoder(decoder.encode(grids(grid_shape=(3, 2, 8))), tokens(B, K, T))
    assert decoder.has_attention == (not isinstance(config, LstmConfig))
    if look is not None:
        assert look.shape == (B, K, T, 6)
        assert look.dtype == torch.float32
        assert (look >= 0).all()
        torch.testing.assert_close(look.sum(-1), torch.ones(B, K, T))


def test_output_depends_on_the_grid(config):
    decoder = build(config)
    given = tokens(B, K, T)
    a, b = (logits_of(decoder, decoder.encode(grids(seed=seed)), given) for seed in (1, 2))
    assert not torch.allclose(a, b, atol=1e-3)


def test_a_blind_decoder_does_not_depend_on_the_grid(config):
    decoder = build(config, zero_features=True)
    given = tokens(B, K, T)
    a, b = (logits_of(decoder, decoder.encode(grids(seed=seed)), given) for seed in (1, 2))
    assert torch.equal(a, b)


def test_attention_knows_where_a_cell_is(config):
    decoder = build(config)
    given = tokens(B, K, T)
    here, there = (logits_of(decoder, decoder.encode(part), given) for part in (grids(), grids().flip(1)))
    assert torch.allclose(here, there, atol=1e-5) != decoder.has_attention


def test_the_scale_of_the_encoder_hardly_matters(config):
    decoder = build(config)
    given = tokens(B, K, T)
    small, large = (logits_of(decoder, decoder.encode(grids() * scale), given) for scale in (1, 100))
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)


def test_gradients_reach_every_parameter(config):
    decoder = build(config, dropout=0.0).train()
    given = tokens(B, K, T)
    logits_of(decoder, decoder.encode(grids()), given).square().sum().backward()
    reached = {name: (p.grad.abs() > 1e-7).float().mean().item() for name, p in decoder.named_parameters()}
    assert {name for name, share in reached.items() if share < 0.6} == set(), "most of every tensor, not a half of it"


def test_a_penalty_on_the_attention_reaches_it(config):
    decoder = build(config).train()
    _, look = decoder(decoder.encode(grids()), tokens(B, K, T))
    assert (look is not None and look.requires_grad) == decoder.has_attention


def test_padding_has_an_embedding_that_is_never_trained(config):
    decoder = build(config).train()
    given = tokens(B, K, T)
    given[:, :, 2:] = PAD
    logits_of(decoder, decoder.encode(grids()), given).sum().backward()
    assert not decoder.embedding.weight.grad[PAD].any()


def test_dropout_acts_in_training_and_not_in_evaluation(config):
    decoder = build(config)
    given = tokens(B, K, T)
    run = lambda: logits_of(decoder, decoder.encode(grids()), given)  # noqa: E731
    assert torch.equal(run(), run())
    decoder.train()
    assert not torch.equal(run(), run())


def test_the_same_seed_builds_the_same_weights(config):
    a, b, other = build(config, seed=4), build(config, seed=4), build(config, seed=5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True))


def test_runs_in_bfloat16_under_autocast(config):
    decoder = build(config)
    given = tokens(B, K, T)
    exact = logits_of(decoder, decoder.encode(grids()), given)
    with torch.autocast("cpu", torch.bfloat16):
        memory = decoder.encode(grids())
        logits, look = decoder(memory, given)
        steps, _ = run_steps(decoder, memory, given)
    torch.testing.assert_close(logits.float(), exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(steps.float(), logits.float(), atol=0.05, rtol=0.05)
    if look is not None:
        assert look.dtype == torch.float32
        torch.testing.assert_close(look.sum(-1), torch.ones(B, K, T))
    decoder.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = logits_of(decoder, decoder.encode(grids()), given).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_an_ensemble_keeps_the_contract(config):
    """Beside a decoder of another layout, so that a tensor of one taken for the other's would be seen."""
    ensemble = Ensemble([build(config), build(transformer(layers=3), seed=1), build(lstm(), seed=2)])
    memory = ensemble.encode(grids())
    assert all(part.shape[:2] == (B, 1) for part in ensemble.initial_state(memory))
    given = tokens(B, K, T)
    (whole, look), (steps, step_look) = ensemble(memory, given), run_steps(ensemble, memory, given)
    torch.testing.assert_close(whole, steps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(look, step_look, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(look.sum(-1), torch.ones(B, K, T))


def test_forward_gives_the_logits_of_the_wanted_places_alone(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    at = torch.tensor([0, 7, 8, B * K * T - 1])
    some, looks = decoder(memory, given, at)
    all_logits, all_looks = decoder(memory, given)
    torch.testing.assert_close(some, all_logits.flatten(0, 2)[at])
    assert looks is None or torch.equal(looks, all_looks)
