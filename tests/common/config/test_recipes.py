"""Recipes replace the train section of the file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from gridcap.common import config as config_package
from gridcap.common.config import PipelineConfig, TrainConfig, recipe_names
from gridcap.common.config.train import RUN_SETTINGS
from gridcap.common.errors import ConfigError, PathError
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.lstm import LstmConfig
from gridcap.train.decoders.registry import DECODER_CONFIGS, resolve_decoder
from gridcap.train.decoders.transformer import TransformerConfig

load_config = partial(config_package.load_config, decoders=DECODER_CONFIGS)
DEFAULTS = resolve_decoder(PipelineConfig())

ROOT = Path(__file__).parents[3]


def write(text: str, name: str = "mine.yaml") -> Path:
    """Write a configuration file to the (temporary) current folder."""
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


MINE = """
train:
  epochs: 3
  learning_rate: 0.5
  schedule: {kind: step, step_size: 2}
  decoder: {family: lstm, hidden_size: 48}
"""


def recipe(text: str = MINE) -> str:
    """Write a recipe to the current folder and return its path."""
    return str(write(text, "my-recipe.yaml"))


def test_a_recipe_defines_the_train_section() -> None:
    train = load_config(recipe=recipe()).train
    assert (train.epochs, train.learning_rate, train.decoder) == (3, 0.5, LstmConfig(hidden_size=48))
    given = {"train": {"output": "runs/my-recipe", **yaml.safe_load(MINE)["train"]}}
    assert train == resolve_decoder(PipelineConfig.model_validate(given)).train


def test_a_recipe_replaces_the_train_section_of_the_file() -> None:
    """Keys of the file's decoder or schedule that the recipe does not give have their defaults."""
    path = write(
        "seed: 4\n"
        "train: {batch_size: 7, decoder: {hidden_size: 5, dropout: 0.9}, schedule: {gamma: 0.1}, ema_decay: 0.5}\n"
        "caption: {beam_size: 9}\n"
    )
    config = load_config(path, recipe=recipe())
    assert config.train == load_config(write("{}"), recipe=recipe()).train
    assert (config.seed, config.caption.beam_size) == (4, 9), "the other sections are unchanged"


KEPT = {
    "features": "f.h5",
    "annotations": "a.json",
    "val_features": "v.h5",
    "val_annotations": "b.json",
    "val_fraction": 0.1,
    "test_fraction": 0.2,
    "output": "out",
    "init_from": "old",
    "checkpoint_steps": 5,
    "checkpoint_minutes": 2.5,
    "precision": "float32",
    "device": "cpu",
    "cuda_graph": "off",
    "grad_accum_steps": 3,
    "min_vocabulary": 7,
    "max_unk": 0.5,
}


def test_a_recipe_keeps_the_run_settings_of_the_file() -> None:
    assert set(KEPT) == RUN_SETTINGS
    path = write(yaml.safe_dump({"train": {**KEPT, "epochs": 99}}))
    train = load_config(path, recipe=recipe()).train.model_dump(mode="json")
    assert {key: train[key] for key in KEPT} == KEPT | {"output": "runs/my-recipe"}, "each recipe has its own folder"
    assert train["epochs"] == 3


def test_a_run_setting_in_a_recipe_overrides_the_file() -> None:
    path = write("train: {output: theirs, device: cpu}\n")
    train = load_config(path, recipe=recipe("train: {output: ours}")).train
    assert (train.output, train.device) == (Path("ours"), "cpu")


def test_run_settings_are_keys_of_the_train_section() -> None:
    assert set(TrainConfig.model_fields) > RUN_SETTINGS


def test_a_recipe_overrides_pipeline_yaml_in_the_current_folder() -> None:
    write("train: {epochs: 9, device: cpu}\n", "pipeline.yaml")
    train = load_config(recipe=recipe()).train
    assert (train.epochs, train.device) == (3, "cpu")


@pytest.mark.parametrize("text", ["train:\n", "train: {decoder: }\n", "seed: 1\n", ""])
def test_a_recipe_overrides_a_file_with_few_settings(text: str) -> None:
    assert load_config(write(text), recipe=recipe()).train == load_config(recipe=recipe()).train


def test_set_and_flags_override_a_recipe() -> None:
    config = load_config(
        write("train: {epochs: 1, batch_size: 1}"),
        {"train.epochs": 5},
        ["train.learning_rate=0.25", "train.ema_decay=0.9"],
        recipe(),
    )
    train = config.train
    assert (train.epochs, train.learning_rate, train.ema_decay, train.batch_size) == (5, 0.25, 0.9, None)
    assert train.schedule.step_size == 2


def test_set_overrides_decoder_options_of_a_recipe() -> None:
    decoder = load_config(None, None, ["train.decoder.dropout=0.5"], recipe()).train.decoder
    assert decoder == LstmConfig(hidden_size=48, dropout=0.5)


def test_choosing_another_family_drops_the_options_of_the_recipe() -> None:
    decoder = load_config(None, {"train.decoder.family": "transformer"}, (), recipe()).train.decoder
    assert decoder == TransformerConfig()
    ours = load_config(None, {"train.decoder.family": "attention"}, (), "transformer").train.decoder
    assert ours == AttentionConfig(embed_size=512, dropout=0.1)


@pytest.mark.parametrize("name", recipe_names())
def test_built_in_recipes_are_found_by_name(name: str) -> None:
    ours = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    if name != "scst":
        ours["train"]["output"] = f"runs/{name}"
    assert load_config(recipe=name) == resolve_decoder(PipelineConfig.model_validate(ours))


def test_a_built_in_recipe_takes_precedence_over_a_file_of_the_same_name() -> None:
    write("train: {epochs: 77}", "transformer")
    write("train: {epochs: 78}", "transformer.yaml")
    assert load_config(recipe="transformer").train.epochs != 77
    assert load_config(recipe="transformer.yaml").train.epochs == 78
    assert load_config(recipe="./transformer").train.epochs == 77


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("topdown", "top-down"), ("show-and-tel", "show-and-tell"), ("transfromer", "transformer"), ("SCST", None)],
)
def test_an_unknown_recipe_suggests_a_similar_one(name: str, suggestion: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe=name)
    assert caught.value.message == f"--recipe {name}: no such recipe or file"
    if suggestion is None:
        assert all(known in caught.value.hint for known in recipe_names() if known != "scst")
    else:
        assert caught.value.hint == f"did you mean {suggestion}?"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("train: {epochs: 1}\nseed: 3\n", "seed"),
        ("caption: {beam_size: 1}\n", "caption"),
        ("epochs: 1\n", "epochs"),
    ],
)
def test_a_recipe_with_another_section_is_an_error(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write("seed: 1"), recipe=recipe(text))
    assert caught.value.message.startswith(f"my-recipe.yaml: {wrong}: ")
    assert ("pipeline.yaml" if "train:" in text else "`train:`") in caught.value.hint


@pytest.mark.parametrize("text", ["", "train:\n", "train: 5\n", "train: [epochs]\n"])
def test_a_recipe_without_a_train_section_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^my-recipe\.yaml: .*train"):
        load_config(recipe=recipe(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epohs: 1}", "train.epohs: unknown key"),
        ("train: {epochs: 0}", "train.epochs: "),
        ("train: {decoder: {family: lstm, attention_size: 3}}", "train.decoder.attention_size: unknown key"),
        ("train: {decoder: {family: transformer, heads: 3}}", "train.decoder: embed_size 256"),
        ("train: {schedule: {kind: noam, warmup_steps: 0}}", "train.schedule: noam"),
        ("train: [", "invalid YAML"),
        ("train: {epochs: 1, epochs: 2}", "invalid YAML"),
        ("- train", "must contain sections"),
    ],
)
def test_errors_in_a_recipe_name_its_file(text: str, message: str) -> None:
    """Even if a flag overrides the invalid value."""
    for flags in ({}, {"train.epochs": 5, "train.decoder.family": "lstm"}):
        with pytest.raises(ConfigError) as caught:
            load_config(write("seed: 1"), flags, (), recipe(text))
        assert caught.value.message.startswith(f"my-recipe.yaml: {message}")


def test_errors_outside_a_recipe_do_not_name_it() -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: train\.precision"):
        load_config(write("train: {precision: float8}"), recipe=recipe())
    with pytest.raises(ConfigError, match=r"^command line"):
        load_config(write("seed: 1"), {"train.epochs": 0}, (), recipe())


def test_a_folder_is_not_a_recipe() -> None:
    Path("mine").mkdir()
    with pytest.raises(PathError, match=r"^mine: "):
        load_config(recipe="mine")
