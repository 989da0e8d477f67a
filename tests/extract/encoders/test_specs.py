"""The list of torchvision encoders."""

from __future__ import annotations

import pytest
from torchvision import models

from gridcap.extract.encoders.specs import CNNS


@pytest.mark.parametrize("name", list(CNNS))
def test_every_spec_names_a_torchvision_model_and_its_weights(name: str) -> None:
    spec = CNNS[name]
    assert spec.name == name
    assert name in models.list_models()
    assert models.get_weight(spec.weights) in models.get_model_weights(name)
