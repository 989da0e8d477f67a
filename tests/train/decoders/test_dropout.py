import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gridcap.train.decoders.dropout import Dropout


@given(st.floats(0.01, 0.99), st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 100))
def test_elements_are_zeroed_or_scaled(p, shape, seed):
    torch.manual_seed(seed)
    x = torch.rand(shape) + 1
    dropped = Dropout(p)(x)
    assert dropped.shape == x.shape
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / (1 - p), rtol=2e-3, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_drop_rate_matches_p_and_mean_is_preserved(p):
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(400_003))
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=0.004)
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_elements_that_share_random_bits_are_independent():
    torch.manual_seed(0)
    dropped_mask = (Dropout(0.5)(torch.ones(100_000, 4)) == 0).float()
    expected = torch.full((4, 4), 0.25) + torch.eye(4) / 4
    torch.testing.assert_close(dropped_mask.t() @ dropped_mask / len(dropped_mask), expected, rtol=0, atol=0.01)


def test_gradient_is_zero_for_dropped_elements_and_scaled_for_others():
    x = torch.ones(1000, requires_grad=True)
    dropped = Dropout(0.25)(x)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())


def test_mask_depends_on_seed_and_call():
    dropout, x = Dropout(0.5), torch.ones(100)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dropout", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_dropped_in_evaluation_mode_or_with_p_zero(dropout):
    x = torch.randn(100)
    assert torch.equal(dropout(x), x)


def test_dtype_is_preserved_for_non_contiguous_input():
    x = torch.ones(64, 3, dtype=torch.bfloat16).t()  # not contiguous
    dropped = Dropout(0.5)(x)
    assert dropped.dtype == torch.bfloat16
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
