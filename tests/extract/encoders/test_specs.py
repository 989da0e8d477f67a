"""The list of built-in encoders."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torchvision import models

from gridcap.common.config.extract import ExtractConfig
from gridcap.extract.encoders.specs import ENCODERS, list_encoders


def test_list_encoders_filters_by_pattern() -> None:
    assert [spec.name for spec in list_encoders("resnet*")] == ["resnet101", "resnet152", "resnet50"]
    assert {spec.name for spec in list_encoders()} == set(ENCODERS)
    assert list_encoders("vit*") == []


def test_listing_encoders_does_not_import_torch() -> None:
    program = "import sys, gridcap.extract.encoders.specs as s; s.list_encoders(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_configuration_accepts_every_encoder() -> None:
    for spec in list_encoders():
        assert ExtractConfig(encoder=spec.name).encoder == spec.name


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_spec_names_a_torchvision_model_and_its_weights(name: str) -> None:
    spec = ENCODERS[name]
    assert spec.name == name
    assert name in models.list_models()
    assert models.get_weight(spec.weights) in models.get_model_weights(name)
