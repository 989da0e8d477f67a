import pytest
import torch

from gridcap.train.decoders.build import build_decoder
from gridcap.train.engine.ema import WeightEMA


@pytest.fixture(params=["lstm", "attention"])
def decoder(request, tiny_decoders):
    torch.manual_seed(0)
    return build_decoder(tiny_decoders[request.param], 9, (2, 2, 8))


def move(decoder, seed):
    """New weights, and a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    return {name: value.clone() for name, value in decoder.named_parameters()}


def test_begins_with_the_weights_themselves(decoder):
    average = WeightEMA(decoder, 0.9)
    for name, value in average.decoder.named_parameters():
        assert torch.equal(value, dict(decoder.named_parameters())[name])


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_is_the_moving_average_with_less_decay_early_on(decoder, decay):
    """0.3 is reached at step 3: (1 + 3) / (10 + 3) > 0.3; 0.999 is not reached here."""
    average = WeightEMA(decoder, decay)
    expected = {name: value.clone() for name, value in decoder.named_parameters()}
    for step in range(1, 8):
        now = move(decoder, step)
        average.update(decoder, step)
        share = min(decay, (1 + step) / (10 + step))
        expected = {name: share * old + (1 - share) * now[name] for name, old in expected.items()}
        for name, value in average.decoder.named_parameters():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_the_trained_weights_stay_as_they_are(decoder):
    average = WeightEMA(decoder, 0.9)
    now = move(decoder, 1)
    average.update(decoder, 1)
    for name, value in decoder.named_parameters():
        assert torch.equal(value, now[name])
        assert value.requires_grad


def test_shares_no_memory_and_needs_no_gradient(decoder):
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


def test_an_update_in_the_midst_of_training_records_nothing(decoder):
    average = WeightEMA(decoder, 0.9)
    grid, tokens = torch.randn(2, 4, 8), torch.ones(2, 1, 3, dtype=torch.int64)
    decoder(decoder.encode(grid), tokens)[0].sum().backward()
    average.update(decoder, 1)
    for parameter in average.decoder.parameters():
        assert parameter.grad is None
        assert parameter.grad_fn is None


def test_of_weights_that_stay_it_is_those_weights(decoder):
    average = WeightEMA(decoder, 0.5)
    for step in range(1, 30):
        average.update(decoder, step)
    for trained, kept in zip(decoder.parameters(), average.decoder.parameters(), strict=True):
        torch.testing.assert_close(trained, kept)
