import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gridcap.train.decoders.dropout import Dropout


@given(st.floats(0.01, 0.99), st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 100))
def test_each_number_is_gone_or_scaled_by_what_is_left(share, shape, seed):
    torch.manual_seed(seed)
    x = torch.rand(shape) + 1
    dropped = Dropout(share)(x)
    assert dropped.shape == x.shape
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / (1 - share), rtol=2e-3, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_the_share_of_zeros_is_the_wanted_one_and_the_mean_stays(share):
    torch.manual_seed(0)
    dropped = Dropout(share)(torch.ones(400_003))
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.004)
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_neighbours_that_share_a_draw_are_independent():
    torch.manual_seed(0)
    gone = (Dropout(0.5)(torch.ones(100_000, 4)) == 0).float()
    expected = torch.full((4, 4), 0.25) + torch.eye(4) / 4
    torch.testing.assert_close(gone.t() @ gone / len(gone), expected, rtol=0, atol=0.01)


def test_what_is_gone_has_no_gradient_and_the_rest_the_scale():
    x = torch.ones(1000, requires_grad=True)
    dropped = Dropout(0.25)(x)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())


def test_a_seed_gives_the_mask_again_and_the_next_call_another():
    dropout, x = Dropout(0.5), torch.ones(100)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dropout", [Dropout(0.5).eval(), Dropout(0.0)])
def test_without_training_or_without_a_share_nothing_is_dropped(dropout):
    x = torch.randn(100)
    assert torch.equal(dropout(x), x)


def test_half_precision_stays_half_precision():
    x = torch.ones(64, 3, dtype=torch.bfloat16).t()  # nor need it be contiguous
    dropped = Dropout(0.5)(x)
    assert dropped.dtype == torch.bfloat16
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
