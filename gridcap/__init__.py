"""Image captioning in two stages: extract feature grids once, then train caption decoders on them.

The names below are the public API. They are imported on first use, so ``import gridcap`` does not load torch.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gridcap.caption.captioner import Captioner
    from gridcap.caption.result import Caption
    from gridcap.common.store.reader import FeatureStore
    from gridcap.extract.api import extract_features
    from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
    from gridcap.train.api import train_decoder

_MODULES = {
    "Caption": "gridcap.caption.result",
    "Captioner": "gridcap.caption.captioner",
    "FeatureStore": "gridcap.common.store.reader",
    "EncoderOptions": "gridcap.extract.encoders.grid_encoder",
    "GridEncoder": "gridcap.extract.encoders.grid_encoder",
    "extract_features": "gridcap.extract.api",
    "train_decoder": "gridcap.train.api",
}

__version__ = metadata.version("gridcap")
__all__ = [
    "Caption",
    "Captioner",
    "EncoderOptions",
    "FeatureStore",
    "GridEncoder",
    "__version__",
    "extract_features",
    "train_decoder",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gridcap' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
