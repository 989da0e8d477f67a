"""The registry of image encoders. Importing this module does not load torch.

An encoder is one module: a subclass of `Encoder`, registered under its name. Packages add encoders through the entry
point group ``gridcap.encoders``, in which the name of an entry point is the name of the encoder::

    [project.entry-points."gridcap.encoders"]
    my_encoder = "my_package.my_encoder"
"""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from gridcap.common.errors import UserError, WeightsError
from gridcap.extract.encoders.specs import TORCHVISION_NAMES

if TYPE_CHECKING:
    from torch import nn

    from gridcap.extract.encoders.weights import WeightsIdentity

GROUP = "gridcap.encoders"
TIMM = "timm/"  # prefix of the names of timm's models


@dataclass(frozen=True)
class EncoderSettings:
    """Choices of the user. None selects the encoder's default.

    Attributes:
        layer: name of an earlier layer whose output is the grid.
        image_size: side of the square input images, in pixels.
        mean, std: per-channel normalization of values in [0, 1].
    """

    layer: str | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


DEFAULTS = EncoderSettings()


@dataclass(frozen=True)
class EncoderSpec:
    """The input and the output of an encoder.

    Attributes:
        name: name of the encoder.
        layer: name of the layer whose output is the grid.
        side: side of the square input images, in pixels.
        grid_shape: (rows, columns, channels) of a grid.
        mean, std: per-channel normalization of values in [0, 1].
        interpolation, crop_pct: interpolation ("bilinear", "bicubic", ...) and share of the shorter side that is kept
            with `resize_mode` "timm"; None: the encoder has no such transform.
    """

    name: str
    layer: str
    side: int
    grid_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str | None = None
    crop_pct: float | None = None

    def resolve_resize_mode(self, resize_mode: str) -> str:
        """Return the mode for `load_image`; "timm" becomes "timm:INTERPOLATION:CROP".

        Raises:
            UserError: the encoder has no transform of timm.
        """
        if resize_mode != "timm":
            return resize_mode
        if self.crop_pct is None:
            raise UserError(
                f"resize_mode timm: {self.name} is not an encoder of timm", "use stretch, crop, or letterbox"
            )
        return f"timm:{self.interpolation}:{self.crop_pct:g}"


class Encoder(ABC):
    """A frozen image encoder.

    Constructing one is cheap: weights are neither located nor loaded.

    Args:
        name: name of the encoder.
        settings: choices of the user.

    Attributes:
        spec: input and output.
        versions: library -> version, recorded in the provenance.
    """

    spec: EncoderSpec
    versions: Mapping[str, str]

    @abstractmethod
    def __init__(self, name: str, settings: EncoderSettings) -> None: ...

    @abstractmethod
    def build(self, identity: WeightsIdentity) -> nn.Module:
        """Build the network and load its weights.

        Args:
            identity: from `identify_weights`.

        Returns:
            A module in eval mode, float32, on the CPU, that maps normalized images (B, 3, side, side) to grids
            (B, rows, columns, channels). It need not be optimized.

        Raises:
            WeightsError: the weights do not match.
        """

    def identify_weights(self, weights: str, download: bool = True) -> WeightsIdentity:
        """Locate weights without loading them; download them once if needed.

        The default implementation knows files.

        Args:
            weights: value of --weights.
            download: whether weights may be downloaded. If not, the identity of missing ones has no SHA-256.

        Raises:
            WeightsError: the weights are not available.
        """
        from gridcap.extract.encoders.weights import identify_file

        if weights == "imagenet" or weights.startswith("random"):
            raise WeightsError(f"{self.spec.name}: there are no {weights} weights", "pass a file with --weights")
        return identify_file(weights)

    def weights_argument(self, name: str) -> str | None:
        """Return the value of --weights for the recorded name of weights; None if they were a local file."""
        return None


EncoderClass = TypeVar("EncoderClass", bound=type[Encoder])
_REGISTERED: dict[str, type[Encoder]] = {}


def register_encoder(*names: str) -> Callable[[EncoderClass], EncoderClass]:
    """Register the decorated subclass of `Encoder` under one or several names.

    A name that ends with "/" is a prefix: the class gets all names that start with it.

    Raises:
        ValueError: a name is taken by another class.
    """

    def register(encoder: EncoderClass) -> EncoderClass:
        for name in names:
            if name in _REGISTERED and _REGISTERED[name].__qualname__ != encoder.__qualname__:
                raise ValueError(f"encoder {name!r} is already registered")
            _REGISTERED[name] = encoder
        return encoder

    return register


def find_encoder(name: str, settings: EncoderSettings = DEFAULTS) -> Encoder:
    """Return an encoder by name.

    Raises:
        UserError: there is no encoder of this name, it needs a package that is not installed, or a setting is invalid.
    """
    if name.startswith(TIMM):
        importlib.import_module("gridcap.extract.encoders.timm")
        return _REGISTERED[TIMM](name, settings)
    if name in TORCHVISION_NAMES:
        importlib.import_module("gridcap.extract.encoders.torchvision")
    elif name not in _REGISTERED and (point := _entry_points().get(name)):
        point.load()
    if name not in _REGISTERED:
        known = sorted({*TORCHVISION_NAMES, *_REGISTERED, *_entry_points()} - {TIMM})
        similar = difflib.get_close_matches(name, [*known, *(f"{TIMM}{model}" for model in _timm_names())], n=3)
        hint = f"did you mean {' or '.join(similar)}? " if similar else ""
        raise UserError(f"encoder {name!r}: unknown name", f"{hint}use one of {', '.join(known)}, or timm/NAME")
    return _REGISTERED[name](name, settings)


def encoder_names(pattern: str = "*") -> Iterator[str]:
    """Yield the names that match a shell-style pattern such as "resnet*" or "timm/*dino*", sorted.

    The pattern "*" does not include timm's models, of which there are more than a thousand.
    """
    names = sorted({*TORCHVISION_NAMES, *_REGISTERED, *_entry_points()} - {TIMM})
    if pattern != "*":
        names += [f"{TIMM}{model}" for model in _timm_names()]
    yield from (name for name in names if fnmatchcase(name, pattern))


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


@lru_cache(maxsize=1)
def _timm_names() -> list[str]:
    """Return the names of timm's models, or none if timm is not installed."""
    try:
        import timm
    except ImportError:
        return []
    names: list[str] = timm.list_models()
    return names
