"""The registry of encoders, and the listing of its names."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from gridcap.common.errors import UserError, WeightsError
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.api import extract_features
from gridcap.extract.encoders import registry
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.registry import (
    Encoder,
    EncoderSettings,
    EncoderSpec,
    encoder_names,
    find_encoder,
    register_encoder,
)
from gridcap.extract.encoders.weights import WeightsIdentity
from gridcap.listings import encoders as list_command


def test_names_are_matched_and_timm_is_listed_on_request() -> None:
    assert list(encoder_names("resnet*")) == ["resnet101", "resnet152", "resnet50"]
    assert list(encoder_names()) == ["inception_v3", "resnet101", "resnet152", "resnet50"]
    assert "timm/vit_small_patch14_dinov2" in list(encoder_names("*dinov2*"))
    assert list(encoder_names("nothing*")) == []


def test_listing_does_not_import_torch() -> None:
    program = "import sys; from gridcap.listings import encoders; encoders([], standalone_mode=False); "
    program += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


def test_the_listing_shows_grids_and_input_sizes() -> None:
    output = CliRunner().invoke(list_command, ["timm/test_vit"]).output
    assert output.splitlines()[1].split() == ["timm/test_vit", "10", "x", "10", "x", "64", "160", "x", "160"]
    many = CliRunner().invoke(list_command, ["timm/vit*"]).output
    assert "match at most 50" in many


@pytest.mark.parametrize(("name", "suggestion"), [("resnet5", "resnet50"), ("timm/resnet10", "timm/resnet10t")])
def test_unknown_names_get_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        find_encoder(name)
    assert f"did you mean {suggestion}" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        (EncoderSettings(layer="Mixed_6e"), (17, 17, 768)),
        (EncoderSettings(image_size=139), (3, 3, 2048)),
        (EncoderSettings(layer="Mixed_5d", image_size=107), (11, 11, 288)),
    ],
)
def test_layers_and_image_sizes_change_the_grid(settings: EncoderSettings, grid: tuple[int, int, int]) -> None:
    spec = find_encoder("inception_v3", settings).spec
    assert spec.grid_shape == grid
    assert spec.layer == (settings.layer or "Mixed_7c")


def test_an_inner_node_of_a_torchvision_network_can_be_the_grid() -> None:
    settings = EncoderSettings(layer="layer2.1.conv2", image_size=64)
    encoder = GridEncoder("resnet50", "random", EncoderOptions("float32", "cpu", "float32"), settings)
    assert encoder.encode(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 8, 8, 128) == (1, *encoder.grid_shape)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EncoderSettings(layer="layer9"), "--layer layer9: not a layer of resnet50"),
        (EncoderSettings(image_size=1, layer="nope"), "--layer nope"),
    ],
)
def test_invalid_settings_are_usage_errors(settings: EncoderSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_encoder("resnet50", settings)


def test_images_that_are_too_small_are_a_usage_error() -> None:
    with pytest.raises(UserError, match="--image-size 8: too small for inception_v3"):
        find_encoder("inception_v3", EncoderSettings(image_size=8))


@pytest.fixture
def mean_colors() -> Iterator[str]:
    """Register an encoder that needs no weights."""

    @register_encoder("mean_colors")
    class MeanColors(Encoder):
        def __init__(self, name: str, settings: EncoderSettings) -> None:
            self.spec = EncoderSpec(name, "pool", settings.image_size or 32, (4, 4, 3))
            self.versions = {"mean_colors": "1"}

        def build(self, identity: WeightsIdentity) -> nn.Module:
            class Network(nn.Module):
                def forward(self, images: torch.Tensor) -> torch.Tensor:
                    return nn.functional.adaptive_avg_pool2d(images, 4).permute(0, 2, 3, 1)

            return Network()

    yield "mean_colors"
    del registry._REGISTERED["mean_colors"]


def test_a_registered_encoder_is_used_like_a_built_in_one(mean_colors: str, tmp_path: Path) -> None:
    (tmp_path / "none.bin").write_bytes(b"")
    encoder = GridEncoder(mean_colors, str(tmp_path / "none.bin"), EncoderOptions("float32", "cpu", "float32"))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    grids = encoder.encode(images)
    means = images.reshape(2, 4, 8, 4, 8, 3).mean((2, 4)) / 255
    np.testing.assert_allclose(grids, (means - encoder.spec.mean) / encoder.spec.std, rtol=1e-4, atol=1e-4)
    assert mean_colors in encoder_names()
    with pytest.raises(WeightsError, match="there are no imagenet weights"):
        GridEncoder(mean_colors, "imagenet")


def test_a_taken_name_is_an_error(mean_colors: str) -> None:
    class Other(Encoder):
        pass

    with pytest.raises(ValueError, match="already registered"):
        register_encoder(mean_colors)(Other)


def test_an_entry_point_is_loaded_when_its_encoder_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> None:
            @register_encoder("plugin")
            class Plugin(Encoder):
                def __init__(self, name: str, settings: EncoderSettings) -> None:
                    self.spec = EncoderSpec(name, "x", 8, (1, 1, 1))

                def build(self, identity: WeightsIdentity) -> nn.Module:
                    return nn.Identity()

    monkeypatch.setattr(registry, "_entry_points", lambda: {"plugin": Point()})
    assert "plugin" in encoder_names()
    assert "plugin" not in registry._REGISTERED
    assert find_encoder("plugin").spec.side == 8
    del registry._REGISTERED["plugin"]


def test_the_example_in_the_docs_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition("## An encoder")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "my_encoder.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = metadata.EntryPoint("color_statistics", "my_encoder", registry.GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"color_statistics": point})
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 48), (80 * i, 0, 0)).save(photos / f"{i}.png")
    extract_features(photos, tmp_path / "store.h5", encoder="color_statistics", progress=False)
    with FeatureStore(tmp_path / "store.h5") as store:
        assert store.grid_shape == (8, 8, 6)
        assert store.provenance["versions"]["my_encoder"] == "1.0"
