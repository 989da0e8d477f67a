"""Source of feature grids, and whether two stores, or a store and a decoder, are compatible."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gridcap.common.errors import MismatchError

# Keys that determine the values of a grid; stores that agree in all of them are interchangeable for a decoder.
MATCHED = ("encoder", "layer", "weights", "preprocessing", "grid_shape", "dtype")

LOSSLESS = "-zstd"  # suffix of codecs that compress without loss: the grids are the same
RECORDED_LATER = {"jpeg_scaled_decoding": False}  # key -> value of stores that were written before it was recorded


def differences(expected: Mapping[str, Any], actual: Mapping[str, Any], keys: Sequence[str] = MATCHED) -> list[str]:
    """Return the differences between two provenances, one line per value.

    Weights are compared by their SHA-256 only, if it is known.
    """
    lines = []
    for key in keys:
        default = RECORDED_LATER.get(key)
        a, b = expected.get(key, default), actual.get(key, default)
        if isinstance(a, dict) and isinstance(b, dict) and not (key == "weights" and a.get("sha256")):
            lines += [f"{key}.{line}" for line in differences(a, b, sorted({*a, *b}))]
            continue
        same = a == b or (key == "dtype" and str(a).removesuffix(LOSSLESS) == str(b).removesuffix(LOSSLESS))
        if isinstance(a, dict) and isinstance(b, dict):
            same = a["sha256"] == b.get("sha256")
        if not same:
            lines.append(f"{key}: expected {_format(a)}, got {_format(b)}")
    return lines


def _format(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value.get('name')} (SHA-256 {str(value['sha256'])[:8]})"
    return json.dumps(value, sort_keys=True)


def check_same_features(
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    expected_source: str,
    actual_source: str,
    views: bool = False,
) -> None:
    """Check that grids come from the same encoder, layer, weights, and preprocessing, with the same shape and type.

    Args:
        expected: the provenance to compare with.
        actual: the provenance to check.
        expected_source: subject and verb for `expected` in the message, such as "runs/x was trained on".
        actual_source: subject and verb for `actual`, such as "features/test.h5 contains".
        views: whether to compare the views of each image, too.

    Raises:
        MismatchError: the provenances differ; the message lists all differences.
    """
    if lines := differences(expected, actual, (*MATCHED, "views") if views else MATCHED):
        raise MismatchError(
            f"{expected_source} other features than {actual_source}: {'; '.join(lines)}",
            "extract features with the same encoder, weights, and preprocessing, or train a decoder on these features",
        )
