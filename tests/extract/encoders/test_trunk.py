"""The trunk: normalization, BatchNorm folding, random initialization, and loading of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from gridcap.common.errors import WeightsError
from gridcap.extract.encoders.specs import CNNS
from gridcap.extract.encoders.trunk import normalize
from tests.extract.encoders.conftest import load, save_hollow_state, scene


@pytest.mark.parametrize("name", list(CNNS))
def test_bfloat16_pixels_are_rounded_float32_pixels(name: str) -> None:
    every = torch.arange(256, dtype=torch.uint8)[None, :, None, None].expand(1, 256, 1, 3)
    exact = normalize(every, CNNS[name], torch.float32)
    assert torch.equal(normalize(every, CNNS[name], torch.bfloat16), exact.bfloat16())


@pytest.mark.usefixtures("short_inception")
def test_random_weights_depend_on_the_seed_only() -> None:
    """They do not depend on the state of global generators or on previous images."""
    images = np.stack([scene("top right", side=75)])
    torch.manual_seed(1)
    first = load("inception_v3", "random:7").encode(images)
    torch.manual_seed(2)
    second = load("inception_v3", "random:7").encode(images)
    assert first.tobytes() == second.tobytes()
    other = load("inception_v3", "random:8").encode(images)
    assert np.linalg.norm(other - first) > 0.3 * np.linalg.norm(first)


def test_a_hollow_state_dict_of_the_right_encoder_loads(tmp_path: Path) -> None:
    """The errors below are therefore not caused by expanded tensors."""
    load("resnet50", save_hollow_state(tmp_path / "r.pth", models.resnet50))


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("inception_v3", models.resnet18),
        ("resnet50", models.resnet18),
        ("resnet50", models.resnet101),  # contains every tensor of resnet50 with the same shape
        ("resnet101", models.resnet152),
        ("resnet50", models.wide_resnet50_2),
        ("resnet101", models.resnet50),
        ("resnet50", lambda: models.inception_v3(init_weights=False)),
    ],
)
def test_weights_of_another_encoder_raise(tmp_path: Path, asked: str, given: Callable[[], nn.Module]) -> None:
    file = save_hollow_state(tmp_path / "other.pth", given)
    with pytest.raises(WeightsError) as caught:
        load(asked, file)
    assert f"{file}: not weights of {asked}" in caught.value.message
    assert caught.value.hint
