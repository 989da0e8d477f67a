"""The registry of decoders. Importing this module does not load torch.

A decoder is one module with its configuration, a subclass of `DecoderConfig`, and a subclass of `Decoder`, registered
under the name of its family. The module ``train/decoders/lstm.py`` contains the family "lstm". Packages add decoders
through the entry point group ``gridcap.decoders``, in which the name of an entry point is that of the family::

    [project.entry-points."gridcap.decoders"]
    my_decoder = "my_package.my_decoder"
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from gridcap.common.config import DecoderConfig, PipelineConfig
from gridcap.common.config.decoders import DecoderSettings
from gridcap.common.errors import UserError

if TYPE_CHECKING:
    from gridcap.train.decoders.base import Decoder

GROUP = "gridcap.decoders"
PACKAGE = "gridcap.train.decoders"

DecoderClass = TypeVar("DecoderClass", bound="type[Decoder]")
_registered: dict[str, type[Decoder]] = {}


def register_decoder(family: str) -> Callable[[DecoderClass], DecoderClass]:
    """Register the decorated subclass of `Decoder`.

    Args:
        family: name of the family, the default of `family` in its configuration class.

    Raises:
        ValueError: the name is taken by another class, or differs from that in the configuration class.
    """

    def register(decoder: DecoderClass) -> DecoderClass:
        if family in _registered and _registered[family].__qualname__ != decoder.__qualname__:
            raise ValueError(f"decoder {family!r} is already registered")
        if decoder.config_class.model_fields["family"].default != family:
            raise ValueError(f"{decoder.config_class.__name__}: family must have the default {family!r}")
        _registered[family] = decoder
        return decoder

    return register


class DecoderConfigs(Mapping[str, type[DecoderConfig]]):
    """The configuration class of each family. A look-up loads the module of the family."""

    def __getitem__(self, family: str) -> type[DecoderConfig]:
        return _find(family).config_class

    def __iter__(self) -> Iterator[str]:
        for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__):
            importlib.import_module(f"{PACKAGE}.{module.name}")
        return iter(sorted({*_registered, *_entry_points()}))

    def __len__(self) -> int:
        return len(list(iter(self)))


DECODER_CONFIGS = DecoderConfigs()


def resolve_decoder(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration with `train.decoder` as an instance of the configuration class of its family.

    Raises:
        UserError: there is no decoder of this family.
        pydantic.ValidationError: an invalid setting.
    """
    decoder = _typed(config.train.decoder)
    return config.model_copy(update={"train": config.train.model_copy(update={"decoder": decoder})})


def build_decoder(config: DecoderSettings, vocabulary_size: int, grid_shape: Sequence[int]) -> Decoder:
    """Build a decoder with newly initialized weights.

    Args:
        config: family and sizes of the decoder.
        vocabulary_size: V.
        grid_shape: (rows, columns, channels) of the grids.

    Raises:
        UserError: there is no decoder of this family.
        pydantic.ValidationError: an invalid setting.
    """
    typed = _typed(config)
    make: Callable[..., Decoder] = _find(typed.family)
    return make(typed, vocabulary_size, math.prod(grid_shape[:-1]), grid_shape[-1])


def _typed(settings: DecoderSettings) -> DecoderConfig:
    if isinstance(settings, DecoderConfig):
        return settings
    if settings.family not in DECODER_CONFIGS:
        families = ", ".join(DECODER_CONFIGS)
        raise UserError(
            f"decoder {settings.family!r}: unknown family", f"use one of {families}, or install the package that has it"
        )
    return DECODER_CONFIGS[settings.family].model_validate(settings.model_dump())


def _find(family: str) -> type[Decoder]:
    """Return a decoder class; KeyError if there is none of this family."""
    if family not in _registered:
        if (point := _entry_points().get(family)) is not None:
            point.load()
        elif family.isidentifier() and importlib.util.find_spec(f"{PACKAGE}.{family}") is not None:
            importlib.import_module(f"{PACKAGE}.{family}")
    return _registered[family]


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}
