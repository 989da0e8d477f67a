"""Provenance: which features can be used together."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import pytest

from gridcap.common.errors import MismatchError
from gridcap.common.store.provenance import check_same_features, differences

Provenance = dict[str, Any]

CHANGES: dict[str, tuple[Any, tuple[str, ...]]] = {  # key -> another value, and what the message must show
    "encoder": ("resnet101", ("inception_v3", "resnet101")),
    "layer": ("layer4", ("Mixed_7c", "layer4")),
    "weights": ({"name": "mine.pth", "sha256": "cd" * 32}, ("imagenet", "abababab", "mine.pth", "cdcdcdcd")),
    "preprocessing": ({"resize_mode": "crop", "side": 299}, ("stretch", "crop")),
    "grid_shape": ([2, 3, 8], ("[2, 3, 4]", "[2, 3, 8]")),
    "dtype": ("float32", ("float16", "float32")),
}


def test_the_same_features_are_accepted_whatever_else_differs(provenance: Provenance) -> None:
    other = {**deepcopy(provenance), "versions": {"torch": "9.9"}, "precision": "bfloat16"}
    check_same_features(provenance, other, "runs/x was trained on", "test.h5 holds")


def test_weights_are_told_apart_by_their_sha256_not_their_name(provenance: Provenance) -> None:
    other = deepcopy(provenance)
    other["weights"]["name"] = "/elsewhere/inception_v3.pth"
    assert differences(provenance, other) == []


@pytest.mark.parametrize(
    "changed", [c for n in range(1, 4) for c in itertools.combinations(CHANGES, n)] + [tuple(CHANGES)]
)
def test_every_difference_of_features_is_listed_and_no_other(provenance: Provenance, changed: tuple[str, ...]) -> None:
    found = {**provenance, **{key: CHANGES[key][0] for key in changed}}
    with pytest.raises(MismatchError) as caught:
        check_same_features(provenance, found, "runs/x was trained on", "test.h5 holds")
    message = caught.value.message
    assert message.startswith("runs/x was trained on other features than test.h5 holds: ")
    assert [line.split()[0].partition(".")[0] for line in message.partition(": ")[2].split("; ")] == list(changed)
    for text in itertools.chain.from_iterable(CHANGES[key][1] for key in changed):
        assert text in message


def test_a_provenance_that_lacks_a_key_differs_in_it(provenance: Provenance) -> None:
    found = {key: value for key, value in provenance.items() if key != "layer"}
    (line,) = differences(provenance, found)
    assert line.startswith("layer")


def test_weights_of_unknown_sha256_are_the_same_only_if_all_else_is(provenance: Provenance) -> None:
    one, two = {"weights": {"name": "theirs"}}, {"weights": {"name": "others"}}
    assert differences({**provenance, **one}, {**provenance, **one}) == []
    assert len(differences({**provenance, **one}, {**provenance, **two})) == 1


# ------------------------------------------------------------------------------------------------------ many shards
