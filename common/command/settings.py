"""The settings on the command line: which were given, how, and whether the command uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from gridcap.common.config import PipelineConfig, load_config
from gridcap.common.config.keys import Decoders
from gridcap.common.errors import UserError

_META_KEY = "gridcap.settings"


@dataclass(frozen=True)
class GivenSettings:
    """Settings of the running command that were given on the command line.

    Args:
        flags: configuration key -> value, for all keys that flags set.
        sets: the KEY=VALUE texts of --set.
        origins: configuration key -> name of the flag that set it, such as "--batch-size".
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin_of(self, prefix: str) -> str | None:
        """Return the flag or --set text of the first given key that is, or is below, a key; None if there is none."""
        given = {text.partition("=")[0]: f"--set {text}" for text in self.sets} | dict(self.origins)
        return next((origin for key, origin in given.items() if f"{key}.".startswith(f"{prefix}.")), None)


def remember_settings(settings: GivenSettings) -> None:
    """Attach the settings to the running command."""
    click.get_current_context().meta[_META_KEY] = settings


def given_settings() -> GivenSettings:
    """Return the settings of the running command; none outside a command."""
    context = click.get_current_context(silent=True)
    settings: GivenSettings = GivenSettings() if context is None else context.meta.get(_META_KEY, GivenSettings())
    return settings


def reload_config(path: Path, decoders: Decoders) -> PipelineConfig:
    """Load the configuration of the running command again, with another file: that of the run to resume.

    Args:
        path: the other file.
        decoders: as for `load_config`.
    """
    settings = given_settings()
    return load_config(path, settings.flags, settings.sets, origins=settings.origins, decoders=decoders)


def reject_ignored(keys: Sequence[str], why: str, hint: str) -> None:
    """Raise UserError if a flag or --set gives a setting that the chosen mode ignores.

    Args:
        keys: keys or sections that are ignored.
        why: end of the sentence "<flag> has no effect ...", such as "without --scst".
        hint: what to do.
    """
    settings = given_settings()
    for key in keys:
        if (origin := settings.origin_of(key)) is not None:
            raise UserError(f"{origin}: has no effect {why}", hint)


def reject_ignored_by_sampling(decoding: str) -> None:
    """Raise UserError if a flag or --set gives a setting of beam search, but captions are sampled."""
    if decoding == "sample":
        reject_ignored(["caption.beam_size", "caption.length_penalty"], "with --decoding sample", "omit it")


def check_settings_are_used(settings: GivenSettings, used: Sequence[str]) -> None:
    """Raise UserError if --set gives an existing key that the running command does not use."""
    command = click.get_current_context().command_path
    sections = {*PipelineConfig.model_fields}
    for text in settings.sets:
        key = text.partition("=")[0]
        relevant = any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for name in used)
        if key.partition(".")[0] in sections and not relevant:
            raise UserError(f"--set {text}: {command} does not use {key}", f"omit it; keys used: {', '.join(used)}")
