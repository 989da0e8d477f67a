"""Validation of the values, with errors that name the source, the key, and a likely correction."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gridcap.common.config.decoders import DecoderConfig
from gridcap.common.config.keys import DECODER, FAMILY_KEY, Decoders, family_of, keys_of_section, suggest_keys
from gridcap.common.config.pipeline import PipelineConfig
from gridcap.common.errors import ConfigError


def validate(
    tree: Mapping[str, Any], path: Path | None, given: Mapping[str, str], decoders: Decoders | None = None
) -> PipelineConfig:
    """Return the typed configuration of a tree of values.

    Args:
        tree: section -> key -> value, as in the YAML file.
        path: the file that the values come from, for errors.
        given: key that does not come from the file -> where it comes from, such as "--batch-size" or "command line".
        decoders: decoder family -> its settings; None: the settings of the decoder are not checked.

    Raises:
        ConfigError: an unknown key, an invalid value, or a contradiction.
    """
    errors = _ErrorConverter(tree, path, given, {} if decoders is None else decoders)
    decoder = None if decoders is None else errors.decoder()
    with errors.converted():
        train = tree.get("train")
        if isinstance(train, Mapping) and (decoder is not None or train.get("decoder", 0) is None):
            tree = {**tree, "train": {**train, "decoder": decoder or {}}}
        elif train is None and decoder is not None:
            tree = {**tree, "train": {"decoder": decoder}}
        return PipelineConfig.model_validate(tree)


@dataclass(frozen=True)
class _ErrorConverter:
    """Converts errors of pydantic into messages with their source and key, and a hint; arguments as for `validate`."""

    tree: Mapping[str, Any]
    path: Path | None
    given: Mapping[str, str]
    decoders: Decoders

    def decoder(self) -> DecoderConfig | None:
        """Return the settings of the decoder; None if the section is not a mapping, which is reported later."""
        train = self.tree.get("train")
        settings = train.get("decoder") if isinstance(train, Mapping) else None
        if isinstance(settings, DecoderConfig):
            return settings
        if settings is not None and not isinstance(settings, Mapping):
            return None
        family = family_of(self.tree)
        if family not in self.decoders:
            *others, last = self.decoders
            similar = difflib.get_close_matches(family, [*others, last], n=1)
            hint = f"did you mean {similar[0]}? " if similar else ""
            raise ConfigError(
                f"{_source_of(FAMILY_KEY, self.path, self.given)}: {FAMILY_KEY}: must be {', '.join(others)} or {last} "
                f"(given: {family!r})",
                f"{hint}decoders of other packages must be installed",
            )
        with self.converted(DECODER.split(".")):
            return self.decoders[family].model_validate({**(settings or {}), "family": family})

    @contextlib.contextmanager
    def converted(self, section: Sequence[str] = ()) -> Iterator[None]:
        """Convert the errors of validating a section, by default the whole tree."""
        try:
            yield
        except ValidationError as error:
            raise self._convert(error, section) from error

    def _convert(self, error: ValidationError, section: Sequence[str]) -> ConfigError:
        first = error.errors()[0]
        key = ".".join([*section, *(str(part) for part in first["loc"])])
        source = _source_of(key, self.path, self.given)
        if first["type"] == "extra_forbidden":
            return self._unknown_key(key, source)
        message = first["msg"].removeprefix("Value error, ")
        value = first["input"] if not isinstance(first["input"], dict) else None
        given = "" if value is None else f" (given: {value!r})"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        prefix = f"{key}: " if key else ""
        message = message.replace("Input should be", "must be")
        hint = "see pipeline.yaml for the valid values of each key"
        return ConfigError(f"{source}: {prefix}{message}{given}{more}", hint)

    def _unknown_key(self, key: str, source: str) -> ConfigError:
        section, _, name = key.rpartition(".")
        if section == DECODER:
            owners = [other for other, model in self.decoders.items() if name in model.model_fields]
            if owners:
                return ConfigError(
                    f"{source}: {key}: unknown key for family {family_of(self.tree)}",
                    f"omit it, or set {FAMILY_KEY}={owners[0]}",
                )
        if suggestions := suggest_keys(key, self.tree, self.decoders):
            *others, last = suggestions
            choice = f"{', '.join(others)} or {last}" if others else last
            return ConfigError(f"{source}: {key}: unknown key; did you mean {choice}?", "correct the key")
        known = ", ".join(keys_of_section(section, self.tree, self.decoders) or PipelineConfig.model_fields)
        return ConfigError(f"{source}: {key}: unknown key", f"known keys: {known}")


def _source_of(key: str, path: Path | None, given: Mapping[str, str]) -> str:
    """Return where the value of a key comes from: the flag, the command line or settings as a whole, or the file."""
    above = [origin for other, origin in given.items() if f"{key}.".startswith(f"{other}.")]
    below = [origin for other, origin in given.items() if other.startswith(f"{key}.")]
    if above:
        return above[-1]
    sources = [*dict.fromkeys(below), *([] if path is None else [str(path)])]
    return " and ".join(sources) or ("settings" if "settings" in given.values() else "command line")
