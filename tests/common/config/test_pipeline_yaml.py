"""pipeline.yaml in the repository contains and documents every key with its default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from inspect import isclass
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from gridcap.common import config as config_package
from gridcap.common.config import DecoderSettings, PipelineConfig, SplitConfig, describe_key
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.registry import DECODER_CONFIGS, resolve_decoder

load_config = partial(config_package.load_config, decoders=DECODER_CONFIGS)
DEFAULTS = resolve_decoder(PipelineConfig())

ROOT = Path(__file__).parents[3]


def write(text: str, name: str = "mine.yaml") -> Path:
    """Write a configuration file to the (temporary) current folder."""
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def test_pipeline_yaml_contains_the_defaults() -> None:
    shipped = load_config(ROOT / "pipeline.yaml").model_dump()
    defaults = DEFAULTS.model_dump()
    assert shipped["data"].pop("splits")
    defaults["data"].pop("splits")
    assert shipped == defaults


def leaf_keys(model: type[BaseModel]) -> Iterator[str]:
    """Yield the keys of a section and its subsections, with the decoder keys of the default family."""
    for name, field in model.model_fields.items():
        inner = [t for t in (get_args(field.annotation) or (field.annotation,)) if isclass(t) and not get_args(t)]
        sections = [t for t in inner if issubclass(t, BaseModel) and t is not SplitConfig]
        if sections:
            section = AttentionConfig if sections[0] is DecoderSettings else sections[0]
            yield from (f"{name}.{key}" for key in leaf_keys(section))
        else:
            yield name


ALL_KEYS = sorted(leaf_keys(PipelineConfig))
SHIPPED = (ROOT / "pipeline.yaml").read_text(encoding="utf-8")


def test_leaf_keys_covers_all_sections() -> None:
    assert {"seed", "data.max_invalid", "train.decoder.attention_size", "train.schedule.kind", "caption.top_p"} < {
        *ALL_KEYS
    }
    assert len(ALL_KEYS) == len(set(ALL_KEYS)) > 70


@pytest.mark.parametrize("key", ALL_KEYS)
def test_pipeline_yaml_contains_every_key(key: str) -> None:
    tree: Any = yaml.safe_load(SHIPPED)
    for part in key.split("."):
        assert part in tree
        tree = tree[part]


def test_every_key_in_pipeline_yaml_has_a_comment() -> None:
    lines = SHIPPED.partition("\nextract:")[2].splitlines()
    values = [line for line in lines if re.match(r" *\w+: [^#\s]", line)]
    assert len(values) > 60
    assert [line for line in values if " # " not in line] == []
    assert max(map(len, SHIPPED.splitlines())) <= 120


def other_decoders() -> dict[str, Any]:
    """Return family -> the values of its section in the comments of pipeline.yaml."""
    decoders = {}
    for block in re.findall(r"  # decoder:.*\n((?:  #   .*\n)+)", SHIPPED):
        tree = yaml.safe_load(block.replace("  #   ", ""))
        decoders[tree["family"]] = tree
    return decoders


@pytest.mark.parametrize("family", [family for family in DECODER_CONFIGS if family != "attention"])
def test_commented_decoder_sections_contain_all_keys_with_their_defaults(family: str) -> None:
    """Uncommenting a section selects the family with its defaults."""
    tree = other_decoders()[family]
    assert set(tree) == set(DECODER_CONFIGS[family].model_fields)
    default = DECODER_CONFIGS[family]()
    assert load_config(write(yaml.safe_dump({"train": {"decoder": tree}}))).train.decoder == default
    indented = "".join(f"    {line}\n" for line in yaml.safe_dump(tree).splitlines())
    swapped = re.sub(r"\n  decoder:\n(?:    .*\n)+", f"\n  decoder:\n{indented}", SHIPPED)
    assert swapped != SHIPPED
    expected = DEFAULTS.train.model_dump() | {"decoder": default.model_dump()}
    assert load_config(write(swapped)).train.model_dump() == expected


def test_pipeline_yaml_contains_every_key_of_a_split() -> None:
    splits = yaml.safe_load((ROOT / "pipeline.yaml").read_text(encoding="utf-8"))["data"]["splits"]
    assert {key for split in splits.values() for key in split} == set(SplitConfig.model_fields)
    assert {"train", "val", "test"} <= set(splits)


def test_val_and_test_splits_in_pipeline_yaml_are_disjoint() -> None:
    splits = load_config(ROOT / "pipeline.yaml").data.splits
    val, test = splits["val"], splits["test"]
    assert val.annotations == test.annotations
    assert val.limit is not None
    assert val.skip + val.limit <= test.skip


@pytest.mark.parametrize("key", [key for key in ALL_KEYS if not key.startswith("train.decoder.")])
def test_every_key_has_a_description(key: str) -> None:
    """Descriptions are the help texts of flags."""
    assert describe_key(key).description


@pytest.mark.parametrize("family", DECODER_CONFIGS)
def test_every_option_of_a_decoder_has_a_description(family: str) -> None:
    fields = DECODER_CONFIGS[family].model_fields
    assert [name for name, field in fields.items() if name != "family" and not field.description] == []
    assert fields["family"].default == family
    assert describe_key("train.decoder.family").description
