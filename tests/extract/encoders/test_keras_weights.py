"""Keras's InceptionV3 weights, against Keras itself."""

from __future__ import annotations

import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gridcap.common.errors import WeightsError
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.keras_weights import read_keras_weights

os.environ.setdefault("KERAS_BACKEND", "torch")


@pytest.fixture(scope="module")
def keras_model():
    """Keras's InceptionV3 with random weights, BatchNorm statistics included."""
    keras = (
        pytest.importorskip("keras", reason="keras is not installed")
        if not os.environ.get("CI")
        else __import__("keras")
    )
    model = keras.applications.InceptionV3(weights=None, include_top=False)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if type(layer).__name__ == "Conv2D":
            height, width, channels, _ = layer.kernel.shape
            layer.set_weights([rng.normal(0, (2 / (height * width * channels)) ** 0.5, layer.kernel.shape)])
        elif type(layer).__name__ == "BatchNormalization":
            size = layer.beta.shape
            layer.set_weights([rng.normal(0, 0.3, size), rng.normal(0, 0.1, size), rng.uniform(0.7, 1.4, size)])
    return model


def write_named(model, file: Path) -> None:
    """Write the layout of the files that keras.applications downloads, in which numbers start at 1."""
    with h5py.File(file, "w") as out:
        for layer in model.layers:
            match = re.fullmatch(r"(conv2d|batch_normalization)(?:_(\d+))?", layer.name)
            for variable in layer.weights if match else ():
                name = f"{match[1]}_{int(match[2] or 0) + 1}"
                out[f"{name}/{name}/{variable.name}:0"] = np.asarray(variable.value.detach())


def test_grids_equal_those_of_keras_and_all_layouts_contain_the_same_weights(keras_model, tmp_path):
    named = tmp_path / "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    write_named(keras_model, named)
    images = np.random.default_rng(1).integers(0, 256, (1, 299, 299, 3), np.uint8)
    options = EncoderOptions(precision="float32", dtype="float32", device="cpu")
    grids = GridEncoder("inception_v3", str(named), options).encode(images)
    expected = np.asarray(keras_model(images.astype(np.float32) / 127.5 - 1).detach())
    assert grids.shape == expected.shape == (1, 8, 8, 2048)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(grids, expected, atol=1e-4 * np.abs(expected).max())

    keras_model.save_weights(tmp_path / "a.weights.h5")
    keras_model.save(tmp_path / "b.keras")
    keras_model.save(tmp_path / "c.h5")
    state = read_keras_weights(named, "inception_v3")
    for name in ("a.weights.h5", "b.keras", "c.h5"):
        other = read_keras_weights(tmp_path / name, "inception_v3")
        assert other.keys() == state.keys()
        assert all(torch.equal(other[key], state[key]) for key in state)


def test_other_files_and_encoders_are_rejected(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as out:
        out["conv2d_1/conv2d_1/kernel:0"] = np.zeros((3, 3, 3, 32), np.float32)
    with pytest.raises(WeightsError, match=r"other\.h5: not Keras weights of inception_v3: 1 convolutions"):
        read_keras_weights(tmp_path / "other.h5", "inception_v3")
    with pytest.raises(WeightsError, match="inception_v3 only, not for resnet50"):
        read_keras_weights(tmp_path / "other.h5", "resnet50")
    for name in ("x.h5", "x.keras"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(WeightsError, match="cannot be read as Keras weights"):
            read_keras_weights(tmp_path / name, "inception_v3")
