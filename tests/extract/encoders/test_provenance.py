"""The provenance of feature grids."""

from __future__ import annotations

import pytest

from gridcap.common.errors import UserError
from gridcap.extract.encoders.grid_encoder import EncoderOptions
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.registry import find_encoder
from gridcap.extract.encoders.weights import identify_weights


def test_the_provenance_contains_everything_that_affects_the_values() -> None:
    def describe(**change: str) -> dict[str, object]:
        values = {"resize_mode": "stretch", "precision": "float32", "dtype": "float16", "weights": "random"} | change
        identity = identify_weights("inception_v3", values["weights"])
        options = EncoderOptions(values["precision"], "cpu", values["dtype"])
        return describe_features(find_encoder("inception_v3"), identity, options, values["resize_mode"], "pillow 1.2.3")

    plain = describe()
    assert plain["encoder"] == "inception_v3"
    assert plain["layer"] == "Mixed_7c"
    assert plain["grid_shape"] == [8, 8, 2048]
    assert plain["precision"] == "float32"
    assert plain["versions"]["pillow"] == "1.2.3"
    assert plain == describe()
    assert plain["compile"] is False
    identity = identify_weights("inception_v3", "random")
    compiled = EncoderOptions("float32", "cpu", compiled=True)
    described = describe_features(find_encoder("inception_v3"), identity, compiled, "stretch", "pillow 1.2.3")
    assert described == {**plain, "compile": True}
    for change in (
        {"resize_mode": "crop"},
        {"precision": "bfloat16"},
        {"dtype": "float32"},
        {"weights": "random:1"},
    ):
        assert describe(**change) != plain, change


def test_an_unknown_device_is_a_usage_error() -> None:
    identity = identify_weights("resnet50", "random")
    with pytest.raises(UserError, match="--device nonsense"):
        describe_features(find_encoder("resnet50"), identity, EncoderOptions(device="nonsense"), "stretch", "pillow 1")
