"""Packed layers compute the same results and are restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from gridcap.common.device import choose_precision
from gridcap.train.decoders import packed as packed_module
from gridcap.train.decoders.packed import packed

needs_operators = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="PyTorch was built without oneDNN or its operators",
)


class Net(nn.Module):
    """Layers with and without bias, one of them nested."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(24, 40)
        self.inner = nn.Sequential(nn.Linear(40, 33, bias=False), nn.Tanh())

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.inner(self.first(inputs))
        return out

    def changed(self) -> list[bool]:
        return ["forward" in vars(layer) for layer in (self.first, self.inner[0])]


@pytest.fixture
def net() -> Iterator[Net]:
    with torch.no_grad():
        yield Net()


@needs_operators
@pytest.mark.parametrize("shape", [(5, 24), (3, 2, 24), (1, 24), (2, 5, 1, 24)])
def test_packed_results_are_equal_for_any_shape(net: Net, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape)
    expected = net(inputs)
    with packed(net, 5):
        assert net.changed() == [True, True]
        torch.testing.assert_close(net(inputs), expected, rtol=1e-5, atol=1e-6)
    assert net.changed() == [False, False]
    assert torch.equal(net(inputs), expected)


@needs_operators
@pytest.mark.skipif(
    choose_precision("auto", torch.device("cpu")) != torch.bfloat16, reason="this CPU does not support bfloat16"
)
def test_packed_layers_compute_in_the_autocast_dtype(net: Net) -> None:
    inputs = torch.randn(6, 24)
    exact = net(inputs)
    with torch.autocast("cpu", torch.bfloat16), packed(net, 6):
        assert net.changed() == [True, True]
        out = net(inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.03)


def test_no_packing_with_gradient_few_rows_or_unsupported_dtype(net: Net) -> None:
    with torch.enable_grad(), packed(net, 5):
        assert net.changed() == [False, False]
    with packed(net, 1):
        assert net.changed() == [False, False]
    with packed(net.double(), 5):
        assert net.changed() == [False, False]


def test_no_packing_without_onednn(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with packed(net, 5):
        assert net.changed() == [False, False]


@needs_operators
def test_nested_blocks_and_errors_restore_layers(net: Net) -> None:
    with packed(net, 5):
        with packed(net, 7):
            pass
        assert net.changed() == [True, True]
    with pytest.raises(ValueError, match="stop"), packed(net, 5):
        raise ValueError("stop")
    assert net.changed() == [False, False]


@needs_operators
def test_other_threads_keep_their_gradient_mode_and_dtype(net: Net) -> None:
    inputs = torch.randn(5, 24)
    expected = net(inputs)

    def train() -> tuple[Tensor, bool]:
        with torch.enable_grad():
            out = net(inputs)
        return out.detach(), out.requires_grad

    def decode_in_bfloat16() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return net(inputs)

    with packed(net, 5), ThreadPoolExecutor(1) as pool:
        out, has_gradient = pool.submit(train).result()
        assert has_gradient
        torch.testing.assert_close(out, expected)
        assert pool.submit(decode_in_bfloat16).result().dtype == torch.bfloat16


@needs_operators
def test_overlapping_blocks_do_not_affect_results(net: Net) -> None:
    inputs = torch.randn(5, 24)
    expected = net(inputs)
    first, second = packed(net, 5), packed(net, 5)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(net(inputs), expected)
    second.__exit__(None, None, None)
    assert net.changed() == [False, False]


def test_packing_uses_the_current_weights(net: Net) -> None:
    inputs = torch.randn(5, 24)
    for _ in range(2):
        net.first.weight.add_(1)
        expected = net(inputs)
        with packed(net, 5):
            torch.testing.assert_close(net(inputs), expected, rtol=1e-4, atol=1e-4)
    assert packed_module.MIN_ROWS <= 5, "otherwise the tests above do not pack"
