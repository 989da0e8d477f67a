"""Flags for configuration keys."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
import pytest
from pydantic import BaseModel

from gridcap.common.command import ConfigFlag
from gridcap.common.config import (
    PipelineConfig,
    describe_key,
    load_config,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest

ROOT = Path(__file__).parents[3]


def value_at(config: BaseModel, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def shipped_flags() -> list[Any]:
    """Return every ConfigFlag of every installed command."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    flags = []
    for command, target in scripts.items():
        module, _, name = target.partition(":")
        for option in getattr(importlib.import_module(module), name).params:
            if isinstance(option, ConfigFlag):
                flags.append(pytest.param(option, id=f"{command} {option.opts[0]}"))
    return flags


@pytest.mark.parametrize("option", shipped_flags())
def test_a_flag_takes_its_help_and_default_from_its_key(option: ConfigFlag) -> None:
    field = describe_key(option.key)
    default = value_at(PipelineConfig(), option.key)
    assert field.description
    assert field.default == default
    assert option.key in (option.help or "")
    if default is not None:
        text = ",".join(default) if isinstance(default, tuple) else str(default)
        assert f"default: {text}" in (option.help or "")
        converted = option.type.convert(text, option, click.Context(click.Command("x")))
        assert converted == default or isinstance(default, tuple)
        assert value_at(load_config(None, {option.key: converted}), option.key) == default


@pytest.mark.parametrize("option", shipped_flags())
def test_a_flag_has_the_type_of_its_key(option: ConfigFlag) -> None:
    """click rejects invalid values before the command runs."""
    annotation = describe_key(option.key).annotation
    kinds = {get_args(t)[0] if get_origin(t) is Annotated else t for t in get_args(annotation) or (annotation,)}
    if get_origin(annotation) is Literal:
        assert isinstance(option.type, click.Choice)
        assert tuple(option.type.choices) == get_args(annotation)
    elif bool in kinds:
        assert isinstance(option.type, click.types.BoolParamType)
        assert option.secondary_opts == [option.opts[0].replace("--", "--no-", 1)]
    elif int in kinds:
        assert option.type is click.INT
    elif float in kinds:
        assert option.type is click.FLOAT
    elif Path in kinds:
        assert isinstance(option.type, click.Path)
    else:
        assert option.type is click.STRING
