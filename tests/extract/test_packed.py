"""Packed convolutions give what the others give, for any batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.inception import BasicConv2d, InceptionA

from extract.encoder import _fold_batch_norm
from extract.packed import PackedConvolution, can_pack, pack_convolutions

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN, or not its operators")


@pytest.fixture
def block() -> nn.Module:
    """One of InceptionV3's, with its BatchNorms folded: several branches, 1 x 1, 3 x 3 and 5 x 5."""
    torch.manual_seed(0)
    block = InceptionA(16, 8).eval()
    _fold_batch_norm(block)
    block.requires_grad_(False)
    return block.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_block_gives_the_same_for_the_batch_it_was_packed_for_and_for_others(
    block: nn.Module, kind: torch.dtype, tolerance: float
) -> None:
    if not can_pack(kind):
        pytest.skip("this CPU does not compute in bfloat16")
    block = block.to(kind)
    images = torch.randn(4, 16, 9, 9, dtype=kind).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = {count: block(images[:count]) for count in (4, 1, 3)}
        pack_convolutions(block, images[:1], len(images))
        for count, wanted in expected.items():
            torch.testing.assert_close(block(images[:count]), wanted, rtol=tolerance, atol=tolerance)
    assert not [layer for layer in block.modules() if isinstance(layer, BasicConv2d)], "all of them were packed"
    assert sum(isinstance(layer, PackedConvolution) for layer in block.modules()) == 7
