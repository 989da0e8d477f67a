"""Packed convolutions compute the same function, for any batch size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, InceptionA

from gridcap.extract.encoders.folding import fold_batch_norm
from gridcap.extract.encoders.packed import PackedConvolution, can_pack, pack_convolutions

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="torch without oneDNN or without its operators")


@pytest.fixture
def block() -> nn.Module:
    """An InceptionV3 block with folded BatchNorm: branches of 1x1, 3x3, and 5x5 convolutions."""
    torch.manual_seed(0)
    block = InceptionA(16, 8).eval()
    fold_batch_norm(block)
    block.requires_grad_(False)
    return block.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_packed_block_is_equivalent_for_any_batch_size(block: nn.Module, kind: torch.dtype, tolerance: float) -> None:
    if not can_pack(kind):
        pytest.skip("this CPU does not support bfloat16")
    block = block.to(kind)
    images = torch.randn(4, 16, 9, 9, dtype=kind).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = {count: block(images[:count]) for count in (4, 1, 3)}
        packed = pack_convolutions(block, images[:1], len(images))
        for count, reference in expected.items():
            torch.testing.assert_close(packed(images[:count]), reference, rtol=tolerance, atol=tolerance)
    assert not [layer for layer in packed.modules() if isinstance(layer, BasicConv2d)], "all blocks must be packed"
    assert sum(isinstance(layer, PackedConvolution) for layer in packed.modules()) == 7


def test_average_pooling_moves_after_a_1x1_convolution(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    calls = []
    real = nn.functional.avg_pool2d
    with torch.inference_mode():
        packed = pack_convolutions(block, images[:1], 2)
        monkeypatch.setattr(
            "gridcap.extract.encoders.packed.F.avg_pool2d",
            lambda x, **arguments: calls.append((x.shape[1], arguments)) or real(x, **arguments),
        )
        packed(images)
    assert calls == [(8, {"kernel_size": 3, "stride": 1, "padding": 1})]


@pytest.mark.parametrize(
    ("case", "layer"),
    [
        ("pool is used twice", {"kernel_size": 1}),
        ("block is called twice", {"kernel_size": 1}),
        ("3x3", {"kernel_size": 3}),
        ("stride", {"kernel_size": 1, "stride": 2}),
        ("padding", {"kernel_size": 1, "padding": 1}),
    ],
)
def test_average_pooling_stays_if_the_order_matters(case: str, layer: dict[str, int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicConv2d(8, 4, **layer)

        def forward(self, images: Tensor) -> Tensor:
            pooled = nn.functional.avg_pool2d(images, kernel_size=3, stride=1, padding=1)
            out: Tensor = self.block(pooled)
            if case == "pool is used twice":
                return out + pooled.mean()
            return out + self.block(images) if case == "block is called twice" else out

    torch.manual_seed(0)
    net = Net().eval()
    fold_batch_norm(net)
    net.requires_grad_(False).to(memory_format=torch.channels_last)
    images = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = net(images)
        packed = pack_convolutions(net, images[:1], 2)
        torch.testing.assert_close(packed(images), expected, rtol=1e-5, atol=1e-5)


def test_a_cnn_without_packable_blocks_is_returned_unchanged() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert pack_convolutions(net, torch.zeros(1, 3, 8, 8), 2) is net
