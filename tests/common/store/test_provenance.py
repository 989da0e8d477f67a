"""Provenance: which features are compatible."""

from __future__ import annotations

import itertools
import re
from copy import deepcopy
from typing import Any

import pytest

from gridcap.common.errors import MismatchError
from gridcap.common.store.provenance import check_same_features, differences

Provenance = dict[str, Any]

CHANGES: dict[str, tuple[Any, tuple[str, ...]]] = {  # key -> another value, and texts of the message
    "encoder": ("resnet101", ("inception_v3", "resnet101")),
    "layer": ("layer4", ("Mixed_7c", "layer4")),
    "weights": ({"name": "mine.pth", "sha256": "cd" * 32}, ("imagenet", "abababab", "mine.pth", "cdcdcdcd")),
    "preprocessing": ({"resize_mode": "crop", "side": 299}, ("stretch", "crop")),
    "grid_shape": ([2, 3, 8], ("[2, 3, 4]", "[2, 3, 8]")),
    "dtype": ("float32", ("float16", "float32")),
}


def test_features_that_differ_only_in_other_keys_are_accepted(provenance: Provenance) -> None:
    other = {**deepcopy(provenance), "versions": {"torch": "9.9"}, "precision": "bfloat16"}
    check_same_features(provenance, other, "runs/x was trained on", "test.h5 contains")


def test_weights_are_compared_by_sha256_not_by_name(provenance: Provenance) -> None:
    other = deepcopy(provenance)
    other["weights"]["name"] = "/elsewhere/inception_v3.pth"
    assert differences(provenance, other) == []


def test_stores_written_before_scaled_decoding_were_decoded_in_full_size(provenance: Provenance) -> None:
    full, scaled = deepcopy(provenance), deepcopy(provenance)
    full["preprocessing"]["jpeg_scaled_decoding"] = False
    scaled["preprocessing"]["jpeg_scaled_decoding"] = True
    assert differences(provenance, full) == []
    assert differences(provenance, scaled) == ["preprocessing.jpeg_scaled_decoding: expected false, got true"]


@pytest.mark.parametrize(
    "changed", [c for n in range(1, 4) for c in itertools.combinations(CHANGES, n)] + [tuple(CHANGES)]
)
def test_message_lists_exactly_the_differences(provenance: Provenance, changed: tuple[str, ...]) -> None:
    actual = {**provenance, **{key: CHANGES[key][0] for key in changed}}
    with pytest.raises(MismatchError) as caught:
        check_same_features(provenance, actual, "runs/x was trained on", "test.h5 contains")
    message = caught.value.message
    assert message.startswith("runs/x was trained on other features than test.h5 contains: ")
    assert [re.split("[.:]", line)[0] for line in message.partition(": ")[2].split("; ")] == list(changed)
    for text in itertools.chain.from_iterable(CHANGES[key][1] for key in changed):
        assert text in message


def test_missing_key_is_a_difference(provenance: Provenance) -> None:
    actual = {key: value for key, value in provenance.items() if key != "layer"}
    (line,) = differences(provenance, actual)
    assert line == 'layer: expected "Mixed_7c", got null'


def test_weights_without_sha256_are_compared_by_all_values(provenance: Provenance) -> None:
    one, two = {"weights": {"name": "theirs"}}, {"weights": {"name": "others"}}
    assert differences({**provenance, **one}, {**provenance, **one}) == []
    assert len(differences({**provenance, **one}, {**provenance, **two})) == 1
