"""Validation of the values, with errors that name the source, the key, and a likely correction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from gridcap.common.config.decoders import FAMILIES, DecoderFamily
from gridcap.common.config.keys import keys_of_section, suggest_keys
from gridcap.common.config.pipeline import PipelineConfig
from gridcap.common.errors import ConfigError


def validate(tree: dict[str, Any], path: Path | None, given: Mapping[str, str]) -> PipelineConfig:
    """Return the typed configuration of a tree of values.

    Args:
        tree: section -> key -> value, as in the YAML file.
        path: the file that the values come from, for errors.
        given: key that does not come from the file -> where it comes from, such as "--batch-size" or "command line".

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
        raise _config_error(error, tree, lambda key: _source_of(key, path, given)) from error


def _config_error(error: ValidationError, tree: Mapping[str, Any], source_of: Callable[[str], str]) -> ConfigError:
    """Convert the first problem into a message with its source and key, and a hint."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    if parts[:2] == ["train", "decoder"] and len(parts) > 2 and parts[2] in get_args(DecoderFamily):
        del parts[2]  # pydantic adds the branch of the union, which is not a key
    if first["type"] == "union_tag_invalid":
        parts.append("family")
    key = ".".join(parts)
    source = source_of(key)
    if first["type"] == "extra_forbidden":
        return _unknown_key(key, source, tree)
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"] if not isinstance(first["input"], dict) else first.get("ctx", {}).get("tag")
    given = "" if value is None else f" (given: {value!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    prefix = f"{key}: " if key else ""
    message = message.replace("Input should be", "must be")
    hint = "see pipeline.yaml for the valid values of each key"
    return ConfigError(f"{source}: {prefix}{message}{given}{more}", hint)


def _source_of(key: str, path: Path | None, given: Mapping[str, str]) -> str:
    """Return where the value of a key comes from: the flag, the command line or settings as a whole, or the file."""
    above = [origin for other, origin in given.items() if f"{key}.".startswith(f"{other}.")]
    below = [origin for other, origin in given.items() if other.startswith(f"{key}.")]
    if above:
        return above[-1]
    sources = [*dict.fromkeys(below), *([] if path is None else [str(path)])]
    return " and ".join(sources) or ("settings" if "settings" in given.values() else "command line")


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
    known = ", ".join(keys_of_section(section, tree) or keys_of_section("", tree))
    return ConfigError(f"{source}: {key}: unknown key", f"known keys: {known}")
