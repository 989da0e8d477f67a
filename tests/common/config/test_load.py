"""Precedence of file, --set, and flags."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from gridcap.common import config as config_package
from gridcap.common.config import PipelineConfig, SplitConfig
from gridcap.common.errors import ConfigError
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.lstm import LstmConfig
from gridcap.train.decoders.registry import DECODER_CONFIGS, resolve_decoder
from gridcap.train.decoders.transformer import TransformerConfig

load_config = partial(config_package.load_config, decoders=DECODER_CONFIGS)
DEFAULTS = resolve_decoder(PipelineConfig())


def write(text: str, name: str = "mine.yaml") -> Path:
    """Write a configuration file to the (temporary) current folder."""
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def value_at(config: BaseModel, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    "text",
    [
        "trai.: {epochs: 2}",
        "se.:x: {t1: }",
        "data: {splixs.: {train: {a}}}",
        "data.images.x: 1",
        "a.b.c: 1",
        "seed.a.b: 1",
    ],
)
def test_unknown_keys_that_contain_dots_are_reported(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: .*unknown key"):
        load_config(write(text))


def test_pipeline_yaml_in_the_current_folder_is_loaded_by_default() -> None:
    assert load_config() == DEFAULTS
    write("seed: 7\n", "pipeline.yaml")
    assert load_config().seed == 7
    assert load_config(write("{}", "other.yaml")).seed == 0


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_gives_the_defaults(text: str) -> None:
    assert load_config(write(text)) == DEFAULTS


def test_set_overrides_the_file_and_flags_override_both() -> None:
    path = write("extract: {batch_size: 1, num_workers: 1, shard_size: 1}\n")
    config = load_config(
        path,
        {"extract.batch_size": 3},
        ["extract.num_workers=2", "extract={batch_size: 2, num_workers: 2, shard_size: 1}"],
    )
    assert (config.extract.batch_size, config.extract.num_workers, config.extract.shard_size) == (3, 2, 1)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.max_grad_norm=1.5", "train.max_grad_norm", 1.5),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.decoder.zero_features=true", "train.decoder.zero_features", True),
        ("train.vocabulary.max_size=null", "train.vocabulary.max_size", None),
        ("data.max_invalid=50%", "data.max_invalid", "50%"),
        ("data.max_invalid=10", "data.max_invalid", "10"),
        ("extract.device=cuda:1", "extract.device", "cuda:1"),
        ("extract.weights=a=b.pth", "extract.weights", "a=b.pth"),
        ("train.output=runs/x", "train.output", Path("runs/x")),
    ],
)
def test_set_parses_values_as_yaml(text: str, key: str, value: object) -> None:
    assert value_at(load_config(None, None, [text]), key) == value


def test_set_creates_a_split() -> None:
    config = load_config(None, None, ["data.splits.mine.images=photos", "data.splits.mine.limit=5"])
    assert config.data.splits == {"mine": SplitConfig(images=Path("photos"), limit=5)}


def test_a_key_given_by_flag_and_by_set_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"extract\.batch_size is given twice"):
        load_config(None, {"extract.batch_size": 3}, ["extract.batch_size=3"])


@pytest.mark.parametrize("text", ["seed", "=3", "", "seed 3"])
def test_set_without_key_and_value_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .*section\.key=value"):
        load_config(None, None, [text])


def test_set_with_invalid_yaml_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--set train\.output=\["):
        load_config(None, None, ["train.output=["])


LSTM_BY = [({"train.decoder.family": "lstm"}, []), ({}, ["train.decoder.family=lstm"])]


@pytest.mark.parametrize(("flags", "sets"), LSTM_BY)
def test_choosing_another_family_drops_the_options_in_the_file(flags: dict[str, Any], sets: list[str]) -> None:
    path = write("train: {decoder: {family: attention, attention_size: 64, hidden_size: 48}}\n")
    assert load_config(path, flags, sets).train.decoder == LstmConfig(hidden_size=48)


@pytest.mark.parametrize(("flags", "sets"), LSTM_BY)
def test_choosing_another_family_drops_options_of_the_implicit_default_family(
    flags: dict[str, Any], sets: list[str]
) -> None:
    path = write("train: {decoder: {attention_size: 64}}\n")
    assert load_config(path).train.decoder == AttentionConfig(attention_size=64)
    assert load_config(path, flags, sets).train.decoder == LstmConfig()


TRANSFORMER_BY = [({"train.decoder.family": "transformer"}, []), ({}, ["train.decoder.family=transformer"])]


@pytest.mark.parametrize(("flags", "sets"), TRANSFORMER_BY)
def test_options_that_the_new_family_shares_are_kept(flags: dict[str, Any], sets: list[str]) -> None:
    """A transformer has no hidden_size, but every family has embed_size, dropout, and zero_features."""
    path = write(
        "train: {decoder: {attention_size: 3, hidden_size: 4, embed_size: 64, dropout: 0.1, zero_features: true}}\n"
    )
    assert load_config(path, flags, sets).train.decoder == TransformerConfig(
        embed_size=64, dropout=0.1, zero_features=True
    )


@pytest.mark.parametrize(("flags", "sets"), TRANSFORMER_BY)
def test_an_option_that_no_family_has_is_an_error_for_every_family(flags: dict[str, Any], sets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: train\.decoder\.embed_siz: unknown key"):
        load_config(write("train: {decoder: {embed_siz: 64}}\n"), flags, sets)


def test_set_options_apply_to_the_chosen_family_in_any_order() -> None:
    path = write("train: {decoder: {attention_size: 64}}\n")
    decoder = load_config(path, None, ["train.decoder.heads=2", "train.decoder.family=transformer"]).train.decoder
    assert decoder == TransformerConfig(heads=2)


@pytest.mark.parametrize("section", ["train={decoder: {family: attention}}", "train.decoder={attention_size: 3}"])
def test_the_family_flag_overrides_a_whole_section_given_by_set(section: str) -> None:
    assert load_config(None, {"train.decoder.family": "lstm"}, [section]).train.decoder == LstmConfig()


@pytest.mark.parametrize("family", ["family: attention, ", ""])
def test_choosing_the_same_family_keeps_its_options(family: str) -> None:
    path = write(f"train: {{decoder: {{{family}attention_size: 64}}}}\n")
    config = load_config(path, {"train.decoder.family": "attention"})
    assert config.train.decoder == AttentionConfig(attention_size=64)


@pytest.mark.parametrize(("flags", "sets"), LSTM_BY)
def test_a_command_line_option_of_another_family_is_an_error(flags: dict[str, Any], sets: list[str]) -> None:
    with pytest.raises(ConfigError, match="attention_size"):
        load_config(None, flags, ["train.decoder.attention_size=64", *sets])


@st.composite
def configs(draw: st.DrawFn) -> PipelineConfig:
    names = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=8)
    paths = names.map(Path)
    sizes = st.integers(1, 10**6)
    split = st.builds(
        SplitConfig, images=paths, annotations=st.none() | paths, limit=st.none() | sizes, skip=st.integers(0, 99)
    )
    decoder = st.one_of(
        st.builds(LstmConfig, hidden_size=sizes, image_injection=st.sampled_from(["first-input", "every-step"])),
        st.builds(
            AttentionConfig, attention_size=sizes, cell=st.sampled_from(["gru", "top-down"]), context_gate=st.booleans()
        ),
        st.builds(TransformerConfig, layers=sizes, dropout=st.floats(0, 0.9)),
    )
    schedule = {"kind": draw(st.sampled_from(["step", "noam"])), "warmup_steps": draw(sizes)}
    return PipelineConfig.model_validate(
        {
            "seed": draw(st.integers(0, 2**32)),
            "data": {"splits": draw(st.dictionaries(names, split, max_size=2)), "features_dir": draw(paths)},
            "train": {
                "decoder": draw(decoder),
                "learning_rate": draw(st.floats(1e-12, 1)),
                "schedule": schedule,
                "max_grad_norm": draw(st.none() | st.floats(0.1, 9)),
                "init_from": draw(st.none() | paths),
            },
            "caption": {"length_penalty": draw(st.floats(0, 2)), "block_trigrams": draw(st.booleans())},
        }
    )


@settings(deadline=None, max_examples=40)
@given(config=configs())
def test_yaml_round_trip(config: PipelineConfig) -> None:
    """A run stores its configuration as YAML and resumes from it."""
    assert load_config(write(config.to_yaml())) == config


def test_to_yaml_selects_sections_and_the_seed() -> None:
    assert set(yaml.safe_load(PipelineConfig().to_yaml("train"))) == {"seed", "train"}


def test_configurations_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PipelineConfig().seed = 3


def test_changed_settings_are_those_that_differ_from_the_defaults() -> None:
    assert PipelineConfig().changed_settings() == {}
    sets = ["train.epochs=5", "train.decoder={family: lstm, hidden_size: 8}", "data.splits.mine.images=photos"]
    config = load_config(None, {"seed": 1}, sets)
    changed = {
        "train.epochs": 5,
        "train.decoder.family": "lstm",
        "train.decoder.hidden_size": 8,
        "data.splits.mine.images": "photos",
        "seed": 1,
    }
    assert config.changed_settings() == changed
    assert config.changed_settings("data") == {"seed": 1, "data.splits.mine.images": "photos"}
