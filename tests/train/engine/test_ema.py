import pytest
import torch

from gridcap.train.decoders.registry import build_decoder
from gridcap.train.engine.ema import WeightEMA


@pytest.fixture(params=["lstm", "attention"])
def decoder(request, tiny_decoders):
    torch.manual_seed(0)
    return build_decoder(tiny_decoders[request.param], 9, (2, 2, 8))


def move(decoder, seed):
    """Change the weights, and return a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    return {name: value.clone() for name, value in decoder.named_parameters()}


def test_ema_starts_with_the_initial_weights(decoder):
    average = WeightEMA(decoder, 0.9)
    for name, value in average.decoder.named_parameters():
        assert torch.equal(value, dict(decoder.named_parameters())[name])


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_ema_equals_the_formula_with_decay_warmup(decoder, decay):
    """The decay reaches 0.3 at step 3 ((1 + 3) / (10 + 3) > 0.3) and does not reach 0.999 here."""
    average = WeightEMA(decoder, decay)
    expected = {name: value.clone() for name, value in decoder.named_parameters()}
    for step in range(1, 8):
        now = move(decoder, step)
        average.update(decoder, step)
        share = min(decay, (1 + step) / (10 + step))
        expected = {name: share * old + (1 - share) * now[name] for name, old in expected.items()}
        for name, value in average.decoder.named_parameters():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_update_does_not_change_the_trained_weights(decoder):
    average = WeightEMA(decoder, 0.9)
    now = move(decoder, 1)
    average.update(decoder, 1)
    for name, value in decoder.named_parameters():
        assert torch.equal(value, now[name])
        assert value.requires_grad


def test_ema_shares_no_memory_and_requires_no_gradient(decoder):
    average = WeightEMA(decoder, 0.9)
    pairs = list(zip(decoder.parameters(), average.decoder.parameters(), strict=True))
    assert pairs
    for trained, kept in pairs:
        assert trained.data_ptr() != kept.data_ptr()
        assert not kept.requires_grad
        assert kept.grad is None
    before = [kept.clone() for _, kept in pairs]
    move(decoder, 1)
    assert all(torch.equal(kept, old) for (_, kept), old in zip(pairs, before, strict=True))


def test_update_is_not_recorded_by_autograd(decoder):
    average = WeightEMA(decoder, 0.9)
    grid, tokens = torch.randn(2, 4, 8), torch.ones(2, 1, 3, dtype=torch.int64)
    decoder(decoder.encode(grid), tokens)[0].sum().backward()
    average.update(decoder, 1)
    for parameter in average.decoder.parameters():
        assert parameter.grad is None
        assert parameter.grad_fn is None


def test_ema_of_constant_weights_is_constant(decoder):
    average = WeightEMA(decoder, 0.5)
    for step in range(1, 30):
        average.update(decoder, step)
    for trained, kept in zip(decoder.parameters(), average.decoder.parameters(), strict=True):
        torch.testing.assert_close(trained, kept)


def test_item_09_buffers_are_averaged_too_and_integer_buffers_copied(decoder):
    decoder.register_buffer("scale", torch.zeros(2))
    decoder.register_buffer("count", torch.tensor(0))
    average = WeightEMA(decoder, 0.5)
    for step in range(1, 60):
        decoder.scale.fill_(4.0)
        decoder.count.fill_(step)
        average.update(decoder, step)
        if step == 1:
            assert average.decoder.scale.tolist() == pytest.approx([4 * (1 - 2 / 11)] * 2)
    assert average.decoder.scale.tolist() == pytest.approx([4.0, 4.0])
    assert average.decoder.count.item() == 59
    assert decoder.scale.tolist() == [4.0, 4.0]
