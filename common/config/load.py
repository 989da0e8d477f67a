"""Loading of the configuration from a file, a recipe, and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gridcap.common.config.data import DataConfig
from gridcap.common.config.decoders import DecoderConfig
from gridcap.common.config.keys import DECODER, FAMILY_KEY, Decoders, family_of
from gridcap.common.config.pipeline import PipelineConfig
from gridcap.common.config.recipes import apply_recipe
from gridcap.common.config.validate import validate
from gridcap.common.config.yaml_file import parse_value, read_yaml
from gridcap.common.errors import ConfigError

DEFAULT_FILE = Path("pipeline.yaml")


def load_config(
    path: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    recipe: str | None = None,
    origins: Mapping[str, str] | None = None,
    decoders: Decoders | None = None,
) -> PipelineConfig:
    """Load the configuration: the file, overridden by the recipe, then by `--set`, then by flags.

    Args:
        path: YAML file; None: `pipeline.yaml` in the current folder if it exists, else the defaults.
        flags: key -> value, such as {"extract.batch_size": 16}.
        sets: texts "section.key=value" with the value in YAML.
        recipe: name of a built-in recipe, or YAML file with a `train` section. It replaces the `train` section of the
            file, except for paths and hardware settings.
        origins: key -> the flag that sets it, for errors; by default, they say "command line".
        decoders: decoder family -> its settings, such as `DECODER_CONFIGS`; None: the settings of the decoder are not
            checked, and `train.decoder` has only those that were given.

    Raises:
        PathError: there is no such file.
        ConfigError: an invalid file, an unknown key, an invalid value, or a contradiction. The message names the
            file and the key.
    """
    flags = flags or {}
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    tree = read_yaml(path) if path is not None else {}
    if recipe is not None:
        apply_recipe(tree, recipe, decoders)
    values = [_parse_set(text) for text in sets]
    given = dict.fromkeys((key for key, _ in values), "command line")
    given |= {key: (origins or {}).get(key, "command line") for key in flags}
    for key, _ in values:
        if key in flags:
            flag = (origins or {}).get(key, "its flag")
            raise ConfigError(f"{key} is given twice: by {flag} and by --set", "give it once")
    values += flags.items()
    for key, value in sorted(values, key=lambda item: _is_family_option(item[0])):  # options after their family
        _set_value(tree, key, value, decoders)
    return validate(tree, path, given, decoders)


def build_config(
    section: str, settings: Mapping[str, Any], recipe: str | None = None, decoders: Decoders | None = None
) -> PipelineConfig:
    """Return a configuration from Python values, without reading pipeline.yaml.

    Args:
        section: "extract" or "train", to which the settings belong; `seed` and the keys of `data` are accepted, too.
        settings: key -> value; values of subsections are dictionaries.
        recipe: name of a built-in recipe, or YAML file with a `train` section.
        decoders: as for `load_config`.

    Raises:
        ConfigError: an unknown key, an invalid value, or a contradiction.
    """
    tree: dict[str, Any] = {}
    if recipe is not None:
        apply_recipe(tree, recipe, decoders)
    values = {_full_key(section, name): value for name, value in settings.items()}
    for key, value in values.items():
        if isinstance(value, Mapping):
            for name, item in value.items():
                _set_value(tree, f"{key}.{name}", item, decoders)
        else:
            _set_value(tree, key, value, decoders)
    return validate(tree, None, dict.fromkeys(values, "settings"), decoders)


def _full_key(section: str, name: str) -> str:
    if name == "seed":
        return name
    return f"data.{name}" if name in DataConfig.model_fields else f"{section}.{name}"


def _parse_set(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text}: must be section.key=value", "for example --set train.max_grad_norm=1.0")
    try:
        return key, parse_value(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML", "put it in quotes") from error


def _set_value(tree: dict[str, Any], key: str, value: Any, decoders: Decoders | None) -> None:
    """Set a value by its key. A change of the decoder family drops the options that the new family lacks."""
    section = tree
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    if key == FAMILY_KEY and decoders is not None:
        before, after = (
            set(decoders.get(family, DecoderConfig).model_fields) for family in (family_of(tree), str(value))
        )
        for option in before - after:
            section.pop(option, None)
    section[last] = value


def _is_family_option(key: str) -> bool:
    return key.startswith(f"{DECODER}.") and key != FAMILY_KEY
