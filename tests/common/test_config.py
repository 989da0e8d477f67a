"""The configuration: one file, then --set, then flags; every mistake named by its key."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from common.command import ConfigFlag
from common.config import (
    AttentionConfig,
    LstmConfig,
    PipelineConfig,
    SplitConfig,
    allowed_bad,
    describe_key,
    load_config,
)
from common.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]


def write(text: str, name: str = "mine.yaml") -> Path:
    """A configuration file in the (temporary) current folder."""
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def value_at(config: BaseModel, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


# ------------------------------------------------------------------------------------- the file as shipped


def test_the_shipped_file_holds_the_defaults() -> None:
    """Its comments say so, and people delete from it what they do not change."""
    shipped = load_config(ROOT / "pipeline.yaml").model_dump()
    defaults = PipelineConfig().model_dump()
    assert shipped["data"].pop("splits")
    defaults["data"].pop("splits")
    assert shipped == defaults


def leaf_keys(model: type[BaseModel]) -> Iterator[str]:
    """Every key of a section and its sections; of the decoders, those of every family."""
    for name, field in model.model_fields.items():
        inner = [t for t in (get_args(field.annotation) or (field.annotation,)) if isinstance(t, type)]
        sections = [t for t in inner if issubclass(t, BaseModel) and t is not SplitConfig]
        if sections:
            for section in sections:
                yield from (f"{name}.{key}" for key in leaf_keys(section))
        else:
            yield name


ALL_KEYS = sorted(set(leaf_keys(PipelineConfig)))


def test_the_keys_of_all_sections_are_found() -> None:
    """A guard for the two tests below: they would hold for an empty list."""
    assert {"seed", "data.max_bad", "train.decoder.attention_size", "train.vocabulary.min_count"} < set(ALL_KEYS)
    assert len(ALL_KEYS) > 35


@pytest.mark.parametrize("key", ALL_KEYS)
def test_every_key_stands_in_the_shipped_file(key: str) -> None:
    tree: Any = yaml.safe_load((ROOT / "pipeline.yaml").read_text(encoding="utf-8"))
    for part in key.split("."):
        assert part in tree
        tree = tree[part]


def test_every_key_of_a_split_stands_in_the_shipped_file() -> None:
    splits = yaml.safe_load((ROOT / "pipeline.yaml").read_text(encoding="utf-8"))["data"]["splits"]
    assert {key for split in splits.values() for key in split} == set(SplitConfig.model_fields)
    assert {"train", "val", "test"} <= set(splits)


def test_shipped_splits_of_one_file_do_not_overlap() -> None:
    splits = load_config(ROOT / "pipeline.yaml").data.splits
    val, test = splits["val"], splits["test"]
    assert val.annotations == test.annotations
    assert val.limit is not None
    assert val.skip + val.limit <= test.skip


@pytest.mark.parametrize("key", [key for key in ALL_KEYS if key != "train.decoder.family"])
def test_every_key_has_a_description(key: str) -> None:
    """It is the help of the key's flag."""
    in_decoder = key.startswith("train.decoder.")
    field = AttentionConfig.model_fields[key.rpartition(".")[2]] if in_decoder else describe_key(key)
    assert field.description


# ------------------------------------------------------------------------------- what goes over what


def test_no_file_gives_the_defaults_and_pipeline_yaml_of_the_current_folder_is_found() -> None:
    assert load_config() == PipelineConfig()
    write("seed: 7\n", "pipeline.yaml")
    assert load_config().seed == 7
    assert load_config(write("{}", "other.yaml")).seed == 0


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_gives_the_defaults(text: str) -> None:
    assert load_config(write(text)) == PipelineConfig()


def test_set_goes_over_the_file_and_flags_over_both() -> None:
    path = write("extract: {batch_size: 1, readers: 1, shard_size: 1}\n")
    config = load_config(
        path, {"extract.batch_size": 3}, ["extract.readers=2", "extract={batch_size: 2, readers: 2, shard_size: 1}"]
    )
    assert (config.extract.batch_size, config.extract.readers, config.extract.shard_size) == (3, 2, 1)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.clip_norm=1.5", "train.clip_norm", 1.5),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.decoder.blind=true", "train.decoder.blind", True),
        ("train.vocabulary.max_size=null", "train.vocabulary.max_size", None),
        ("data.max_bad=50%", "data.max_bad", "50%"),
        ("data.max_bad=10", "data.max_bad", "10"),
        ("extract.device=cuda:1", "extract.device", "cuda:1"),
        ("extract.weights=a=b.pth", "extract.weights", "a=b.pth"),
        ("train.output=runs/x", "train.output", Path("runs/x")),
    ],
)
def test_set_reaches_any_key_with_a_value_in_yaml(text: str, key: str, value: object) -> None:
    assert value_at(load_config(None, None, [text]), key) == value


def test_set_makes_a_split() -> None:
    config = load_config(None, None, ["data.splits.mine.images=photos", "data.splits.mine.limit=5"])
    assert config.data.splits == {"mine": SplitConfig(images=Path("photos"), limit=5)}


def test_the_same_key_by_flag_and_by_set_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"extract\.batch_size is given twice"):
        load_config(None, {"extract.batch_size": 3}, ["extract.batch_size=3"])


@pytest.mark.parametrize("text", ["seed", "=3", "", "seed 3"])
def test_a_set_that_is_no_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .*section\.key=value"):
        load_config(None, None, [text])


def test_a_set_whose_value_is_not_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set train\.output=\["):
        load_config(None, None, ["train.output=["])


LSTM_BY = [({"train.decoder.family": "lstm"}, []), ({}, ["train.decoder.family=lstm"])]


@pytest.mark.parametrize(("flags", "sets"), LSTM_BY)
def test_another_family_drops_the_options_of_the_one_in_the_file(flags: dict[str, Any], sets: list[str]) -> None:
    path = write("train: {decoder: {family: attention, attention_size: 64, hidden_size: 48}}\n")
    assert load_config(path, flags, sets).train.decoder == LstmConfig(hidden_size=48)


@pytest.mark.parametrize(("flags", "sets"), LSTM_BY)
def test_the_family_may_be_unsaid_in_the_file_that_is_overruled(flags: dict[str, Any], sets: list[str]) -> None:
    """The default family is attention, so its options may stand there without it."""
    path = write("train: {decoder: {attention_size: 64}}\n")
    assert load_config(path).train.decoder == AttentionConfig(attention_size=64)
    assert load_config(path, flags, sets).train.decoder == LstmConfig()


@pytest.mark.parametrize("family", ["family: attention, ", ""])
def test_the_same_family_by_flag_keeps_its_options(family: str) -> None:
    path = write(f"train: {{decoder: {{{family}attention_size: 64}}}}\n")
    config = load_config(path, {"train.decoder.family": "attention"})
    assert config.train.decoder == AttentionConfig(attention_size=64)


@pytest.mark.parametrize(("flags", "sets"), LSTM_BY)
def test_an_option_that_the_command_line_gives_to_another_family_is_refused(
    flags: dict[str, Any], sets: list[str]
) -> None:
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
    decoder = st.builds(LstmConfig, hidden_size=sizes) | st.builds(AttentionConfig, attention_size=sizes)
    return PipelineConfig.model_validate(
        {
            "seed": draw(st.integers(0, 2**32)),
            "data": {"splits": draw(st.dictionaries(names, split, max_size=2)), "features": draw(paths)},
            "train": {"decoder": draw(decoder), "learning_rate": draw(st.floats(1e-12, 1))},
            "caption": {"length_penalty": draw(st.floats(0, 2))},
        }
    )


@settings(deadline=None, max_examples=40)
@given(config=configs())
def test_a_configuration_written_as_yaml_reads_as_itself(config: PipelineConfig) -> None:
    """A run keeps its configuration as YAML and goes on from it."""
    assert load_config(write(config.to_yaml())) == config


def test_yaml_of_some_sections_holds_those_and_the_seed() -> None:
    assert set(yaml.safe_load(PipelineConfig().to_yaml("train"))) == {"seed", "train"}


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PipelineConfig().seed = 3


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("sed: 1", "sed", "seed"),
        ("extrac: {batch_size: 1}", "extrac", "extract"),
        ("extract: {batchsize: 1}", "extract.batchsize", "batch_size"),
        ("train: {vocabulary: {mincount: 1}}", "train.vocabulary.mincount", "min_count"),
        ("train: {decoder: {hiden_size: 1}}", "train.decoder.hiden_size", "hidden_size"),
        ("train: {decoder: {family: lstm, droput: 0}}", "train.decoder.droput", "dropout"),
        ("data: {splits: {train: {images: x, limt: 1}}}", "data.splits.train.limt", "limit"),
        ("data: {split: {}}", "data.split", "splits"),
        ("caption: {beam: 1}", "caption.beam", "beam_size"),
    ],
)
def test_an_unknown_key_is_refused_with_its_whole_path_and_the_key_that_is_meant(
    text: str, key: str, meant: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.what == f"mine.yaml: {key}: unknown key"
    assert caught.value.hint == f"did you mean {meant}?"


def test_an_unknown_key_like_no_other_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"caption\.zzz: unknown key") as caught:
        load_config(write("caption: {zzz: 1}"))
    assert "beam_size, max_length" in caught.value.hint


def test_an_unknown_key_by_set_is_said_to_come_from_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"^command line: extract\.batchsize: unknown key"):
        load_config(write("seed: 1"), None, ["extract.batchsize=3"])


def test_an_option_of_another_family_in_the_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.decoder\.attention_size: unknown key"):
        load_config(write("train: {decoder: {family: lstm, attention_size: 64}}"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed: -1", "seed"),
        ("seed: one", "seed"),
        ("data: {max_bad: a lot}", "data.max_bad"),
        ("data: {max_bad: -5%}", "data.max_bad"),
        ("data: {splits: {train: {}}}", "data.splits.train.images"),
        ("data: {splits: {train: {images: x, limit: 0}}}", "data.splits.train.limit"),
        ("data: {splits: {train: {images: x, skip: -1}}}", "data.splits.train.skip"),
        ("extract: {encoder: vgg16}", "extract.encoder"),
        ("extract: {weights: random:x}", "extract.weights"),
        ("extract: {dtype: float8}", "extract.dtype"),
        ("extract: {shard_size: 0}", "extract.shard_size"),
        ("extract: 5", "extract"),
        ("train: {epochs: 0}", "train.epochs"),
        ("train: {learning_rate: 0}", "train.learning_rate"),
        ("train: {precision: float16}", "train.precision"),
        ("train: {vocabulary: {max_size: 4}}", "train.vocabulary.max_size"),
        ("train: {decoder: {dropout: 1}}", "train.decoder.dropout"),
        ("caption: {length_penalty: -1}", "caption.length_penalty"),
    ],
)
def test_a_bad_value_is_refused_with_the_file_and_its_key(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.what.startswith(f"mine.yaml: {key}: ")
    assert caught.value.hint


def test_an_unknown_family_is_refused_with_its_key_and_the_families() -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: train\.decoder\.family: .*lstm.*attention.*transformer"):
        load_config(write("train: {decoder: {family: transformer}}"))


def test_a_bad_value_is_shown_with_the_number_of_others() -> None:
    with pytest.raises(ConfigError, match=r"given: -3\) \(and 1 more\)"):
        load_config(write("extract: {batch_size: -3, readers: 0}"))


@pytest.mark.parametrize("weights", ["imagenet", "random", "random:12", "mine.pth", "randomized.safetensors"])
def test_weights_are_a_name_a_seed_or_a_file(weights: str) -> None:
    Path("randomized.safetensors").touch()
    assert load_config(None, {"extract.weights": weights}).extract.weights == weights


def test_half_precision_on_a_cpu_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"extract: precision float16 needs a GPU"):
        load_config(write("extract: {precision: float16, device: cpu}"))
    assert load_config(write("extract: {precision: float16, device: cuda}")).extract.precision == "float16"
    assert load_config(write("extract: {precision: bfloat16, device: cpu}")).extract.precision == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "sets"),
    [
        ({"extract.precision": "float16", "extract.device": "cpu"}, []),
        ({}, ["train.decoder.family=transformer"]),
        ({"data.splits.mine": {"images": None}}, []),
        ({}, ["extract={batch_size: 0}"]),
    ],
)
def test_what_the_command_line_got_wrong_is_not_blamed_on_the_file(flags: dict[str, Any], sets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^command line"):
        load_config(write("seed: 1"), flags, sets)


@pytest.mark.parametrize("text", ["seed: 1\nseed: 1\n", "train:\n  epochs: 1\n  output: x\n  epochs: 2\n"])
def test_a_key_that_stands_twice_is_refused_with_its_name_and_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml.*(seed|epochs)' stands twice.*line"):
        load_config(write(text))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"seed: [\n", "not valid YAML"),
        (b"seed:\t1\n\tepochs: 2\n", "not valid YAML"),
        (b"seed: !!python/object:os.system {}\n", "not valid YAML"),
        (b"seed: 1\0", "not valid YAML"),
        (b"\xff\xfe\x00", "not a UTF-8 text file"),
        (b"- seed\n", "must hold sections"),
        (b"just words\n", "must hold sections"),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_name(content: bytes, why: str) -> None:
    Path("mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^mine\.yaml: {why}"):
        load_config(Path("mine.yaml"))


def test_a_missing_file_is_refused_with_its_name() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: No such file") as caught:
        load_config(Path("nowhere.yaml"))
    assert "--config" in caught.value.hint


def test_yaml_anchors_and_merges_work() -> None:
    text = "data:\n  splits:\n    val: &coco {images: x, limit: 5}\n    test: {<<: *coco, skip: 5}\n"
    assert load_config(write(text)).data.splits["test"] == SplitConfig(images=Path("x"), limit=5, skip=5)


@pytest.mark.parametrize("text", ["extract:\n", "train:\n  vocabulary:\n  decoder:\n", "data:\n  # features: x\n"])
def test_a_section_left_empty_has_its_defaults(text: str) -> None:
    """pipeline.yaml says: delete what you do not change."""
    assert load_config(write(text)) == PipelineConfig()


@pytest.mark.parametrize("by_set", [False, True])
def test_an_impossible_date_is_not_yaml(by_set: bool) -> None:
    text = "train.output=2026-99-01"
    path = write("{}" if by_set else "train: {output: 2026-99-01}")
    with pytest.raises(ConfigError, match="2026-99-01" if by_set else "not valid YAML"):
        load_config(path, None, [text] if by_set else [])


@pytest.mark.parametrize(
    ("max_bad", "total", "allowed"),
    [("0", 50, 0), ("10", 50, 10), ("10", 5, 10), ("20%", 50, 10), ("0%", 50, 0), ("2.5%", 200, 5)],
)
def test_max_bad_is_a_number_or_a_share(max_bad: str, total: int, allowed: float) -> None:
    assert allowed_bad(max_bad, total) == pytest.approx(allowed)


# ------------------------------------------------------------------------------------------ the flags' keys


def shipped_flags() -> list[Any]:
    """Every flag of every installed command that stands for a key."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    found = []
    for command, place in scripts.items():
        module, _, name = place.partition(":")
        for option in getattr(importlib.import_module(module), name).params:
            if isinstance(option, ConfigFlag):
                found.append(pytest.param(option, id=f"{command} {option.opts[0]}"))
    return found


@pytest.mark.parametrize("option", shipped_flags())
def test_a_flag_is_described_by_its_key_and_takes_its_default(option: ConfigFlag) -> None:
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
def test_a_flag_offers_what_its_key_takes(option: ConfigFlag) -> None:
    """A choice where the key has one, numbers for numbers: click then refuses the rest before anything runs."""
    annotation = describe_key(option.key).annotation
    kinds = {t for t in get_args(annotation) or (annotation,) if t is not types.NoneType}
    if get_origin(annotation) is Literal:
        assert isinstance(option.type, click.Choice)
        assert tuple(option.type.choices) == get_args(annotation)
    elif int in kinds:
        assert option.type is click.INT
    elif float in kinds:
        assert option.type is click.FLOAT
    elif Path in kinds:
        assert isinstance(option.type, click.Path)
    else:
        assert option.type is click.STRING
