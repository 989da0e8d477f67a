"""Validation of the values, with errors that name the source, the key, and a likely correction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from gridcap.common.config.decoders import FAMILIES, DecoderFamily
from gridcap.common.config.keys import keys_of_section, suggest_keys
from gridcap.common.config.pipeline import PipelineConfig
from gridcap.common.errors import ConfigError


def validate(tree: dict[str, Any], path: Path | None, from_command_line: set[str]) -> PipelineConfig:
    """Return the typed configuration of a tree of values.

    Args:
        tree: section -> key -> value, as in the YAML file.
        path: the file that the values come from, for errors.
        from_command_line: the keys that come from the command line instead, for errors.

    Raises:
        ConfigError: an unknown key, an invalid value, or a contradiction.
    """
    train = tree.get("train")
    if isinstance(train, dict) and train.get("decoder", 0) is None:
        train["decoder"] = {}
    decoder = train.get("decoder") if isinstance(train, dict) else None
    if isinstance(decoder, dict):
        decoder.setdefault("family", "attention")
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise _config_error(error, path, tree, from_command_line) from error


def _config_error(
    error: ValidationError, path: Path | None, tree: Mapping[str, Any], from_command_line: set[str]
) -> ConfigError:
    """Convert the first problem into a message with its source and key, and a hint."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    if parts[:2] == ["train", "decoder"] and len(parts) > 2 and parts[2] in get_args(DecoderFamily):
        del parts[2]  # pydantic adds the branch of the union, which is not a key
    if first["type"] == "union_tag_invalid":
        parts.append("family")
    key = ".".join(parts)
    source = _source_of(key, path, from_command_line)
    if first["type"] == "extra_forbidden":
        return _unknown_key(key, source, tree)
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"] if not isinstance(first["input"], dict) else first.get("ctx", {}).get("tag")
    given = "" if value is None else f" (given: {value!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    prefix = f"{key}: " if key else ""
    hint = "see pipeline.yaml for the valid values of each key"
    return ConfigError(f"{source}: {prefix}{message}{given}{more}", hint)


def _source_of(key: str, path: Path | None, from_command_line: set[str]) -> str:
    if path is None or any(f"{key}.".startswith(f"{given}.") for given in from_command_line):
        return "command line"
    if any(given.startswith(f"{key}.") for given in from_command_line):
        return f"command line and {path}"
    return str(path)


def _unknown_key(key: str, source: str, tree: Mapping[str, Any]) -> ConfigError:
    section, _, name = key.rpartition(".")
    if section == "train.decoder":
        family = tree["train"]["decoder"]["family"]
        owners = [other for other, model in FAMILIES.items() if name in model.model_fields]
        if owners:
            return ConfigError(
                f"{source}: {key}: unknown key for family {family}",
                f"omit it, or set {section}.family={owners[0]}",
            )
    if suggestions := suggest_keys(key, tree):
        *others, last = suggestions
        choice = f"{', '.join(others)} or {last}" if others else last
        return ConfigError(f"{source}: {key}: unknown key; did you mean {choice}?", "correct the key")
    known = ", ".join(keys_of_section(section, tree))
    return ConfigError(f"{source}: {key}: unknown key", f"known keys: {known}")
