"""The decoder contract, for every family and layout."""

import math

import pytest
import torch

from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.ensemble import Ensemble
from gridcap.train.decoders.lstm import LstmConfig
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.decoders.transformer import TransformerConfig

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
    **{
        f"{cell}, as published": attention(
            cell=cell,
            output_layer=output,
            initial_state="zeros",
            normalize_grid=False,
            project_grid=project,
            cell_positions=False,
            input_dropout=0.0,
        )
        for cell, output, project in (("gru", "dense", True), ("att2in", "hidden", True), ("top-down", "hidden", False))
    },
    "lstm with attention, as published": attention(
        cell="lstm", normalize_grid=False, project_grid=False, cell_positions=False, context_gate=True
    ),
    "lstm, as published": lstm(image_injection="first-input", normalize_grid=False),
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
    """Return the results of T calls of `step`: (B, K, T, V) logits and (B, K, T, P) attention or None."""
    state = tuple(part.expand(*given.shape[:2], *part.shape[2:]) for part in decoder.initial_state(memory))
    logits, weights = [], []
    for t in range(given.shape[2]):
        out, state, attended = decoder.step(given[:, :, t], state, memory)
        logits.append(out)
        weights.append(attended)
    return torch.stack(logits, 2), None if weights[0] is None else torch.stack(weights, 2)


@pytest.mark.parametrize("grid_shape", [(2, 2, 8), (7, 7, 16), (1, 3, 5)])
def test_forward_equals_t_calls_of_step(config, grid_shape):
    decoder = build(config, grid_shape)
    memory = decoder.encode(grids(grid_shape=grid_shape))
    given = tokens(B, K, T)
    (whole, attention_weights), (steps, step_weights) = decoder(memory, given), run_steps(decoder, memory, given)
    assert whole.shape == (B, K, T, V)
    torch.testing.assert_close(whole, steps, atol=1e-5, rtol=1e-5)
    if decoder.has_attention:
        assert attention_weights.shape == (B, K, T, math.prod(grid_shape[:-1]))
        torch.testing.assert_close(attention_weights, step_weights, atol=1e-5, rtol=1e-5)
    else:
        assert attention_weights is None
        assert step_weights is None


@pytest.mark.parametrize("length", [1, 40])
def test_forward_equals_steps_for_any_length(config, length):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, length)
    torch.testing.assert_close(decoder(memory, given)[0], run_steps(decoder, memory, given)[0], atol=1e-5, rtol=1e-5)


def test_initial_state_has_one_hypothesis_per_image(config):
    decoder = build(config)
    assert all(part.shape[:2] == (B, 1) for part in decoder.initial_state(decoder.encode(grids())))


def test_memory_has_one_row_per_image(config):
    memory = build(config).encode(grids())
    assert all(len(part) == B for part in memory)


def test_state_can_be_reordered(config):
    """After a gather over K, the decoder continues as if it had read the selected hypotheses from the start."""
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    selected = torch.tensor([[3, 3, 0, 1], [0, 2, 1, 2], [1, 1, 1, 1]])
    state = tuple(part.expand(B, K, *part.shape[2:]) for part in decoder.initial_state(memory))
    for t in range(T - 2):
        _, state, _ = decoder.step(given[:, :, t], state, memory)
    state = tuple(part.gather(1, selected.reshape(B, K, *(1,) * (part.dim() - 2)).expand_as(part)) for part in state)
    past = given[:, :, : T - 2].gather(1, selected[..., None].expand(-1, -1, T - 2))
    whole, _ = decoder(memory, torch.cat([past, given[:, :, T - 2 :]], 2))
    for t in range(T - 2, T):
        logits, state, _ = decoder.step(given[:, :, t], state, memory)
        torch.testing.assert_close(logits, whole[:, :, t], atol=1e-5, rtol=1e-5)


def test_hypotheses_of_an_image_are_independent(config):
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


def test_images_of_a_batch_are_independent(config):
    decoder = build(config)
    given = tokens(B, K, T)
    batch, batch_attention = decoder(decoder.encode(grids()), given)
    for i in range(B):
        alone, attention_weights = decoder(decoder.encode(grids()[i : i + 1]), given[i : i + 1])
        torch.testing.assert_close(alone[0], batch[i], atol=1e-5, rtol=1e-5)
        if batch_attention is not None:
            torch.testing.assert_close(attention_weights[0], batch_attention[i], atol=1e-5, rtol=1e-5)


def test_logits_are_causal(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    other = given.clone()
    other[:, :, 3:] = other[:, :, 3:] % (V - 1) + 1
    before, after = logits_of(decoder, memory, given), logits_of(decoder, memory, other)
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])


def test_logits_depend_on_all_previous_tokens(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    other = given.clone()
    other[:, :, 0] = other[:, :, 0] % (V - 1) + 1
    before, after = logits_of(decoder, memory, given), logits_of(decoder, memory, other)
    assert ((before - after).abs().amax(-1) > 1e-6).all()


def test_attention_sums_to_one(config):
    decoder = build(config, (3, 2, 8))
    _, attention_weights = decoder(decoder.encode(grids(grid_shape=(3, 2, 8))), tokens(B, K, T))
    assert decoder.has_attention == (not isinstance(config, LstmConfig))
    if attention_weights is not None:
        assert attention_weights.shape == (B, K, T, 6)
        assert attention_weights.dtype == torch.float32
        assert (attention_weights >= 0).all()
        torch.testing.assert_close(attention_weights.sum(-1), torch.ones(B, K, T))


def test_output_depends_on_the_grid(config):
    decoder = build(config)
    given = tokens(B, K, T)
    a, b = (logits_of(decoder, decoder.encode(grids(seed=seed)), given) for seed in (1, 2))
    assert not torch.allclose(a, b, atol=1e-3)


def test_zero_features_ignores_the_grid(config):
    decoder = build(config, zero_features=True)
    given = tokens(B, K, T)
    a, b = (logits_of(decoder, decoder.encode(grids(seed=seed)), given) for seed in (1, 2))
    assert torch.equal(a, b)


def test_attention_decoders_are_sensitive_to_cell_positions(config):
    decoder = build(config)
    given = tokens(B, K, T)
    original, flipped = (logits_of(decoder, decoder.encode(part), given) for part in (grids(), grids().flip(1)))
    assert torch.allclose(original, flipped, atol=1e-5) != (
        decoder.has_attention and getattr(config, "cell_positions", True)
    )


def test_logits_are_nearly_invariant_to_feature_scale(config):
    if not getattr(config, "normalize_grid", True):
        pytest.skip("the features are not normalized")
    decoder = build(config)
    given = tokens(B, K, T)
    small, large = (logits_of(decoder, decoder.encode(grids() * scale), given) for scale in (1, 100))
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)


def test_gradients_reach_every_parameter(config):
    decoder = build(config, dropout=0.0).train()
    given = tokens(B, K, T)
    logits_of(decoder, decoder.encode(grids()), given).square().sum().backward()
    reached = {name: (p.grad.abs() > 1e-7).float().mean().item() for name, p in decoder.named_parameters()}
    assert {name for name, share in reached.items() if share < 0.6} == set(), "more than half of every tensor"


def test_attention_is_differentiable(config):
    decoder = build(config).train()
    _, attention_weights = decoder(decoder.encode(grids()), tokens(B, K, T))
    assert (attention_weights is not None and attention_weights.requires_grad) == decoder.has_attention


def test_padding_embedding_gets_no_gradient(config):
    decoder = build(config).train()
    given = tokens(B, K, T)
    given[:, :, 2:] = PAD
    logits_of(decoder, decoder.encode(grids()), given).sum().backward()
    assert not decoder.embedding.weight.grad[PAD].any()


def test_dropout_is_active_in_training_only(config):
    decoder = build(config)
    given = tokens(B, K, T)
    run = lambda: logits_of(decoder, decoder.encode(grids()), given)  # noqa: E731
    assert torch.equal(run(), run())
    decoder.train()
    assert not torch.equal(run(), run())


def test_initialization_depends_only_on_the_seed(config):
    a, b, other = build(config, seed=4), build(config, seed=4), build(config, seed=5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True))


def test_runs_in_bfloat16_under_autocast(config):
    decoder = build(config)
    given = tokens(B, K, T)
    exact = logits_of(decoder, decoder.encode(grids()), given)
    with torch.autocast("cpu", torch.bfloat16):
        memory = decoder.encode(grids())
        logits, attention_weights = decoder(memory, given)
        steps, _ = run_steps(decoder, memory, given)
    torch.testing.assert_close(logits.float(), exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(steps.float(), logits.float(), atol=0.05, rtol=0.05)
    if attention_weights is not None:
        assert attention_weights.dtype == torch.float32
        torch.testing.assert_close(attention_weights.sum(-1), torch.ones(B, K, T))
    decoder.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = logits_of(decoder, decoder.encode(grids()), given).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_ensemble_satisfies_the_contract(config):
    """The members have different layouts, so that mixed-up tensors would be noticed."""
    ensemble = Ensemble([build(config), build(transformer(layers=3), seed=1), build(lstm(), seed=2)])
    memory = ensemble.encode(grids())
    assert all(part.shape[:2] == (B, 1) for part in ensemble.initial_state(memory))
    given = tokens(B, K, T)
    (whole, attention_weights), (steps, step_weights) = ensemble(memory, given), run_steps(ensemble, memory, given)
    torch.testing.assert_close(whole, steps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention_weights, step_weights, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention_weights.sum(-1), torch.ones(B, K, T))


def test_forward_with_positions_returns_those_logits_only(config):
    decoder = build(config)
    memory = decoder.encode(grids())
    given = tokens(B, K, T)
    positions = torch.tensor([0, 7, 8, B * K * T - 1])
    some, some_attention = decoder(memory, given, positions)
    all_logits, all_attention = decoder(memory, given)
    torch.testing.assert_close(some, all_logits.flatten(0, 2)[positions])
    assert some_attention is None or torch.equal(some_attention, all_attention)
