"""Where grids come from, and whether two stores, or a store and a decoder, can be used together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gridcap.common.errors import MismatchError

# What decides the numbers in a grid; two stores that agree in these can feed one decoder.
MATCHED = ("encoder", "layer", "weights", "preprocessing", "grid_shape", "dtype")


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], keys: Sequence[str] = MATCHED) -> list[str]:
    """What differs between two provenances, a line a value. Weights are told apart by their SHA-256 alone."""
    lines = []
    for key in keys:
        a, b = wanted.get(key), found.get(key)
        if not isinstance(a, dict) or not isinstance(b, dict):
            if a != b:
                lines.append(f"{key} {_short(a)} there, {_short(b)} here")
        elif key == "weights" and a.get("sha256"):
            if a["sha256"] != b.get("sha256"):
                lines.append(f"{key} {_short(a)} there, {_short(b)} here")
        else:
            lines += [f"{key}.{line}" for line in differences(a, b, sorted({*a, *b}))]
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value.get('name')} (SHA-256 {str(value['sha256'])[:8]})"
    return json.dumps(value, sort_keys=True)


def check_same_features(
    wanted: Mapping[str, Any], found: Mapping[str, Any], who: str, what: str, views: bool = False
) -> None:
    """Make sure that grids come from the same encoder, layer, weights, preprocessing, shape and type.

    Args:
        wanted, found: two provenances.
        who, what: name them in the message: "runs/x was trained on", "features/test.h5 holds".
        views: whether the same views of each image must be there too.

    Raises:
        MismatchError: with every difference.
    """
    if lines := differences(wanted, found, (*MATCHED, "views") if views else MATCHED):
        raise MismatchError(
            f"{who} other features than {what}: {'; '.join(lines)}",
            "extract with the same encoder, weights and preprocessing, or train a decoder on these features",
        )
