"""Shared fixtures: rendered scenes, torchvision references, and short encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.transforms import functional

from gridcap.common.scenes import Scene, calibration_batch, render
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.specs import CNNS

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def scene(place: str, side: int = 299, seed: int = 0, color: str = "red") -> np.ndarray:
    """Return a rendered scene, uint8 (side, side, 3)."""
    return np.array(render(Scene("large", color, "square", place), np.random.default_rng(seed), side))


def textures(count: int, side: int) -> np.ndarray:
    """Return colored noise with the 1/f spectrum of photos: uint8 (count, side, side, 3)."""
    rng = np.random.default_rng(5)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    waves = np.fft.rfft2(rng.normal(size=(count, 3, side, side))) / frequency
    noise = np.fft.irfft2(waves, (side, side)).transpose(0, 2, 3, 1)
    noise = noise @ np.array([[1, 1, 1], [0.3, 0, -0.3], [0.1, -0.2, 0.1]])  # correlated channels
    return (128 + 50 * noise / noise.std((1, 2, 3), keepdims=True)).clip(0, 255).astype(np.uint8)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of each pair of flattened grids."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    return np.asarray((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def torchvision_input(images: np.ndarray) -> torch.Tensor:
    """Normalize as torchvision's presets do, after resizing."""
    return torch.stack([functional.normalize(functional.to_tensor(image), *IMAGENET) for image in images])


def make_lively(model: nn.Module, images: np.ndarray, scale: tuple[float, float] = (0.5, 1.5)) -> nn.Module:
    """Set BatchNorm statistics and affine parameters far from 0 and 1, without vanishing activations.

    Large biases keep most ReLU units active. Otherwise a deep network with random weights is chaotic and amplifies
    rounding errors to 1e-3.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(*scale, generator=generator)
                module.bias.uniform_(1, 2, generator=generator)
                module.momentum = None
        model.train()
        model(torchvision_input(images))
    return model.eval()


def hooked_grid(model: nn.Module, layer: str, images: np.ndarray) -> np.ndarray:
    """Return the output of a layer in torchvision's own forward pass: (B, rows, columns, channels)."""
    outputs: list[torch.Tensor] = []
    handle = getattr(model, layer).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.inference_mode():
        model(torchvision_input(images))
    handle.remove()
    return outputs[0].permute(0, 2, 3, 1).numpy()


def load(name: str, weights: str | Path, dtype: str = "float32") -> GridEncoder:
    """Return a float32 encoder on the CPU."""
    return GridEncoder(name, str(weights), EncoderOptions("float32", "cpu", dtype))


def save_hollow_state(file: Path, build: Callable[[], nn.Module]) -> Path:
    """Save a state dict with the right names and shapes to a small file: each tensor is one expanded value."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build().state_dict().items()}
    torch.save({name: torch.ones(()).expand(shape) for name, shape in shapes.items()}, file)
    return file


@dataclasses.dataclass(frozen=True)
class Reference:
    """torchvision's inception_v3 with lively weights: its state dict, some images, and their grids."""

    state: dict[str, torch.Tensor]
    images: np.ndarray
    grids: np.ndarray


@pytest.fixture(scope="session")
def inception() -> Reference:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.inception_v3(weights=None, init_weights=False, transform_input=True)
        make_lively(model, calibration_batch(4, 299))
    images = np.stack([scene("top left", seed=7), scene("bottom right", seed=8, color="yellow")])
    return Reference(model.state_dict(), images, hooked_grid(model, "Mixed_7c", images))


@pytest.fixture(scope="session")
def random_encoder() -> GridEncoder:
    return load("inception_v3", "random", "float16")


@pytest.fixture
def short_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce inception_v3 to its first layers and small images: random weights take one second instead of ten."""
    spec = CNNS["inception_v3"]
    monkeypatch.setitem(CNNS, "inception_v3", dataclasses.replace(spec, layers=spec.layers[:9], side=75))
