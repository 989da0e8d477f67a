"""Folding of BatchNorm."""

from __future__ import annotations

import torch
from torch import nn

from gridcap.extract.encoders.folding import fold_batch_norm, fold_if_equal


def test_folding_batch_norm_preserves_the_function() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(8, eps=0.001)
            self.down = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.bn(self.conv(x))) + self.down(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(), nn.BatchNorm2d(8))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.2, 3)
        x = torch.randn(2, 3, 9, 9)
    network.eval()
    with torch.no_grad():
        before = network(x)
        fold_batch_norm(network)
        after = network(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    remaining = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(remaining) == 1, "all but the last, which does not follow a convolution, are folded"


class BatchNormAct2d(nn.BatchNorm2d):
    """Stand-in for timm's class of this name."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class Scaled(nn.BatchNorm2d):
    """A subclass that does something unknown."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def randomize(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3)
    return network.eval()


def test_the_activation_of_a_batch_norm_subclass_is_kept_and_unknown_subclasses_are_not_folded() -> None:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        network = randomize(
            nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 3), Scaled(8), nn.Conv2d(8, 4, 1))
        )
        x = torch.randn(2, 3, 9, 9)
        before = network(x)
        fold_batch_norm(network)
        torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-4)
    assert [type(m).__name__ for m in network.children()] == ["Conv2d", "SiLU", "Conv2d", "Scaled", "Conv2d"]


class OutOfOrder(nn.Module):
    """A network whose BatchNorm comes after the convolution in the list of children, but before it in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(self.bn(x)))


def test_a_network_that_cannot_be_folded_is_returned_unchanged() -> None:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        network = randomize(OutOfOrder())
        x = torch.randn(2, 3, 9, 9)
        assert fold_if_equal(network, x) is network
        plain = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        folded = fold_if_equal(plain, x)
        assert folded is not plain
        assert isinstance(plain[1], nn.BatchNorm2d), "the original is not modified"
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)
