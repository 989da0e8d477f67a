"""The configuration: one file, then a recipe, then --set, then flags; every mistake named by its key."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from gridcap.common.command import ConfigFlag
from gridcap.common.config import (
    AttentionConfig,
    LstmConfig,
    PipelineConfig,
    SplitConfig,
    TrainConfig,
    TransformerConfig,
    describe_key,
    load_config,
    max_invalid_count,
    recipe_names,
)
from gridcap.common.config.decoders import FAMILIES
from gridcap.common.config.train import NOT_OF_A_RECIPE
from gridcap.common.errors import ConfigError

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
    """Every key of a section and its sections; of the decoders, those of the default family."""
    for name, field in model.model_fields.items():
        inner = [t for t in (get_args(field.annotation) or (field.annotation,)) if isinstance(t, type)]
        sections = [t for t in inner if issubclass(t, BaseModel) and t is not SplitConfig]
        if sections:
            section = AttentionConfig if AttentionConfig in sections else sections[0]
            yield from (f"{name}.{key}" for key in leaf_keys(section))
        else:
            yield name


ALL_KEYS = sorted(leaf_keys(PipelineConfig))
SHIPPED = (ROOT / "pipeline.yaml").read_text(encoding="utf-8")


def test_the_keys_of_all_sections_are_found() -> None:
    """A guard for the tests below: they would hold for an empty list."""
    assert {"seed", "data.max_invalid", "train.decoder.attention_size", "train.schedule.kind", "caption.top_p"} < {
        *ALL_KEYS
    }
    assert len(ALL_KEYS) == len(set(ALL_KEYS)) > 70


@pytest.mark.parametrize("key", ALL_KEYS)
def test_every_key_stands_in_the_shipped_file(key: str) -> None:
    tree: Any = yaml.safe_load(SHIPPED)
    for part in key.split("."):
        assert part in tree
        tree = tree[part]


def test_every_key_of_the_shipped_file_has_a_comment() -> None:
    lines = SHIPPED.partition("\nextract:")[2].splitlines()
    values = [line for line in lines if re.match(r" *\w+: [^#\s]", line)]
    assert len(values) > 60
    assert [line for line in values if " # " not in line] == []
    assert max(map(len, SHIPPED.splitlines())) <= 120


def other_decoders() -> dict[str, Any]:
    """Family -> the tree of the section that the shipped file shows in comments."""
    found = {}
    for block in re.findall(r"  # decoder:.*\n((?:  #   .*\n)+)", SHIPPED):
        tree = yaml.safe_load(block.replace("  #   ", ""))
        found[tree["family"]] = tree
    return found


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "attention"])
def test_the_other_families_stand_in_comments_with_all_keys_and_their_defaults(family: str) -> None:
    """Who takes such a block instead of the one above it has that family with nothing changed."""
    tree = other_decoders()[family]
    assert set(tree) == set(FAMILIES[family].model_fields)
    default = FAMILIES[family]()
    assert load_config(write(yaml.safe_dump({"train": {"decoder": tree}}))).train.decoder == default
    indented = "".join(f"    {line}\n" for line in yaml.safe_dump(tree).splitlines())
    swapped = re.sub(r"\n  decoder:\n(?:    .*\n)+", f"\n  decoder:\n{indented}", SHIPPED)
    assert swapped != SHIPPED
    expected = PipelineConfig().train.model_dump() | {"decoder": default.model_dump()}
    assert load_config(write(swapped)).train.model_dump() == expected


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


@pytest.mark.parametrize("key", [key for key in ALL_KEYS if not key.startswith("train.decoder.")])
def test_every_key_has_a_description(key: str) -> None:
    """It is the help of the key's flag."""
    assert describe_key(key).description


@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_of_a_decoder_has_a_description(family: str) -> None:
    fields = FAMILIES[family].model_fields
    assert [name for name, field in fields.items() if name != "family" and not field.description] == []
    assert fields["family"].default == family
    assert describe_key("train.decoder.family").description


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


TRANSFORMER_BY = [({"train.decoder.family": "transformer"}, []), ({}, ["train.decoder.family=transformer"])]


@pytest.mark.parametrize(("flags", "sets"), TRANSFORMER_BY)
def test_only_the_options_that_the_new_family_lacks_are_dropped(flags: dict[str, Any], sets: list[str]) -> None:
    """A transformer has no hidden_size; embed_size, dropout and blind every family has."""
    path = write(
        "train: {decoder: {attention_size: 3, hidden_size: 4, embed_size: 64, dropout: 0.1, zero_features: true}}\n"
    )
    assert load_config(path, flags, sets).train.decoder == TransformerConfig(
        embed_size=64, dropout=0.1, zero_features=True
    )


@pytest.mark.parametrize(("flags", "sets"), TRANSFORMER_BY)
def test_an_option_that_is_no_familys_is_refused_whatever_family_is_chosen(
    flags: dict[str, Any], sets: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: train\.decoder\.embed_siz: unknown key"):
        load_config(write("train: {decoder: {embed_siz: 64}}\n"), flags, sets)


def test_options_by_set_are_those_of_the_family_that_is_chosen_whatever_the_order() -> None:
    path = write("train: {decoder: {attention_size: 64}}\n")
    decoder = load_config(path, None, ["train.decoder.heads=2", "train.decoder.family=transformer"]).train.decoder
    assert decoder == TransformerConfig(heads=2)


@pytest.mark.parametrize("section", ["train={decoder: {family: attention}}", "train.decoder={attention_size: 3}"])
def test_a_flag_for_the_family_goes_over_a_whole_section_by_set(section: str) -> None:
    assert load_config(None, {"train.decoder.family": "lstm"}, [section]).train.decoder == LstmConfig()


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
    decoder = st.one_of(
        st.builds(LstmConfig, hidden_size=sizes, image=st.sampled_from(["first-input", "every-step"])),
        st.builds(
            AttentionConfig, attention_size=sizes, cell=st.sampled_from(["gru", "top-down"]), context_gate=st.booleans()
        ),
        st.builds(TransformerConfig, layers=sizes, dropout=st.floats(0, 0.9)),
    )
    schedule = {"kind": draw(st.sampled_from(["step", "noam"])), "warmup_steps": draw(sizes)}
    return PipelineConfig.model_validate(
        {
            "seed": draw(st.integers(0, 2**32)),
            "data": {"splits": draw(st.dictionaries(names, split, max_size=2)), "features": draw(paths)},
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
        ("train: {decoder: {family: transformer, head: 2}}", "train.decoder.head", "heads"),
        ("train: {schedule: {warmup: 1}}", "train.schedule.warmup", "warmup_steps"),
        ("train: {scst: {sample: 1}}", "train.scst.sample", "samples"),
        ("caption: {beam: 1}", "caption.beam", "beam_size"),
    ],
)
def test_an_unknown_key_is_refused_with_its_whole_path_and_the_key_that_is_meant(
    text: str, key: str, meant: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.message == f"mine.yaml: {key}: unknown key"
    assert caught.value.hint == f"did you mean {meant}?"


def test_an_unknown_key_like_no_other_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"caption\.zzz: unknown key") as caught:
        load_config(write("caption: {zzz: 1}"))
    assert "search, beam_size, max_length" in caught.value.hint


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
        ("data: {max_invalid: a lot}", "data.max_invalid"),
        ("data: {max_invalid: -5%}", "data.max_invalid"),
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
        ("train: {decoder: {cell: rnn}}", "train.decoder.cell"),
        ("train: {decoder: {attention_reg: -1}}", "train.decoder.attention_reg"),
        ("train: {decoder: {family: lstm, image_injection: nowhere}}", "train.decoder.image_injection"),
        ("train: {decoder: {family: lstm, image_bottleneck: 0}}", "train.decoder.image_bottleneck"),
        ("train: {decoder: {family: transformer, layers: 0}}", "train.decoder.layers"),
        ("train: {objective: reward}", "train.objective"),
        ("train: {optimizer: sgd}", "train.optimizer"),
        ("train: {shuffle: all}", "train.shuffle"),
        ("train: {grad_accum_steps: 0}", "train.grad_accum_steps"),
        ("train: {weight_decay: -1}", "train.weight_decay"),
        ("train: {schedule: {kind: linear}}", "train.schedule.kind"),
        ("train: {schedule: {warmup_steps: -1}}", "train.schedule.warmup_steps"),
        ("train: {schedule: {step_size: 0}}", "train.schedule.step_size"),
        ("train: {schedule: {gamma: 0}}", "train.schedule.gamma"),
        ("train: {schedule: {gamma: 1.1}}", "train.schedule.gamma"),
        ("train: {max_grad_norm: 0}", "train.max_grad_norm"),
        ("train: {max_grad_value: 0}", "train.max_grad_value"),
        ("train: {label_smoothing: 1}", "train.label_smoothing"),
        ("train: {scheduled_sampling: {max_prob: 1.1}}", "train.scheduled_sampling.max_prob"),
        ("train: {scheduled_sampling: {prob_step: 0}}", "train.scheduled_sampling.prob_step"),
        ("train: {ema_decay: 1}", "train.ema_decay"),
        ("train: {patience: 0}", "train.patience"),
        ("train: {scst: {samples: 1}}", "train.scst.samples"),
        ("train: {scst: {temperature: 0}}", "train.scst.temperature"),
        ("train: {scst: {bleu_weight: -1}}", "train.scst.bleu_weight"),
        ("train: {checkpoint_steps: 0}", "train.checkpoint_steps"),
        ("train: {checkpoint_minutes: 0}", "train.checkpoint_minutes"),
        ("caption: {decoding: greedy}", "caption.decoding"),
        ("caption: {decoding: sample, temperature: 0}", "caption.temperature"),
        ("caption: {decoding: sample, top_k: 0}", "caption.top_k"),
        ("caption: {decoding: sample, top_p: 0}", "caption.top_p"),
        ("caption: {decoding: sample, top_p: 1.1}", "caption.top_p"),
        ("caption: {length_penalty: -1}", "caption.length_penalty"),
    ],
)
def test_a_bad_value_is_refused_with_the_file_and_its_key(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.message.startswith(f"mine.yaml: {key}: ")
    assert caught.value.hint


def test_an_unknown_family_is_refused_with_its_key_and_the_families() -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: train\.decoder\.family: .*lstm.*attention.*transformer"):
        load_config(write("train: {decoder: {family: gpt}}"))


@pytest.mark.parametrize("family", ["[lstm]", "{lstm: 1}", "5", "null"])
def test_a_family_that_is_no_name_is_refused(family: str) -> None:
    for sets in ([f"train.decoder.family={family}"], [f"train.decoder={{family: {family}}}"]):
        with pytest.raises(ConfigError, match=r"^command line: train\.decoder"):
            load_config(None, None, sets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {decoder: {family: transformer, heads: 7}}", "train.decoder: embed_size 256 is not a multiple of"),
        ("train: {schedule: {kind: noam}}", "train.schedule: noam falls from the end of the warm-up on"),
        ("caption: {temperature: 0.5}", "caption: temperature, top_k and top_p are for decoding: sample"),
        ("caption: {top_k: 5}", "caption: temperature, top_k and top_p are for decoding: sample"),
        ("caption: {decoding: beam, top_p: 0.9}", "caption: temperature, top_k and top_p are for decoding: sample"),
        ("caption: {decoding: sample, block_trigrams: true}", "caption: block_trigrams is for decoding: beam"),
        ("caption: {decoding: sample, mbr: true}", "caption: mbr is for decoding: beam"),
        ("caption: {beam_size: 2, mbr: true}", "caption: mbr is for decoding: beam, with a beam_size"),
    ],
)
def test_what_contradicts_itself_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.message.startswith(f"mine.yaml: {message}")


@pytest.mark.parametrize(
    "text",
    [
        "train: {decoder: {family: transformer, embed_size: 21, heads: 7}}",
        "train: {schedule: {kind: noam, warmup_steps: 1}}",
        "train: {schedule: {kind: cosine}}",
        "caption: {decoding: sample, temperature: 0.5, top_k: 5, top_p: 0.9}",
        "caption: {decoding: beam, temperature: 1.0, block_trigrams: true}",
        "train: {objective: scst}",
    ],
)
def test_what_agrees_is_taken(text: str) -> None:
    assert load_config(write(text)) != PipelineConfig()


def test_a_bad_value_is_shown_with_the_number_of_others() -> None:
    with pytest.raises(ConfigError, match=r"given: -3\) \(and 1 more\)"):
        load_config(write("extract: {batch_size: -3, num_workers: 0}"))


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
        ({}, ["train.decoder.family=gpt"]),
        ({"train.decoder.family": "transformer"}, ["train.decoder.heads=3"]),
        ({}, ["train.schedule.kind=noam"]),
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
        (b"[" * 100_000, "not valid YAML"),
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
    ("max_invalid", "total", "allowed"),
    [("0", 50, 0), ("10", 50, 10), ("10", 5, 10), ("20%", 50, 10), ("0%", 50, 0), ("2.5%", 200, 5)],
)
def test_max_invalid_is_a_number_or_a_share(max_invalid: str, total: int, allowed: float) -> None:
    assert max_invalid_count(max_invalid, total) == pytest.approx(allowed)


# ------------------------------------------------------------------------------------------------- recipes

MINE = """
train:
  epochs: 3
  learning_rate: 0.5
  schedule: {kind: step, step_size: 2}
  decoder: {family: lstm, hidden_size: 48}
"""


def recipe(text: str = MINE) -> str:
    """A recipe of one's own in the current folder."""
    return str(write(text, "my-recipe.yaml"))


def test_a_recipe_is_the_train_section() -> None:
    train = load_config(recipe=recipe()).train
    assert (train.epochs, train.learning_rate, train.decoder) == (3, 0.5, LstmConfig(hidden_size=48))
    assert train == TrainConfig.model_validate({"output": "runs/my-recipe", **yaml.safe_load(MINE)["train"]})


def test_a_recipe_replaces_what_the_file_says_of_training() -> None:
    """Nothing of the file's decoder or schedule shines through, key by key."""
    path = write(
        "seed: 4\n"
        "train: {batch_size: 7, decoder: {hidden_size: 5, dropout: 0.9}, schedule: {gamma: 0.1}, ema_decay: 0.5}\n"
        "caption: {beam_size: 9}\n"
    )
    config = load_config(path, recipe=recipe())
    assert config.train == load_config(write("{}"), recipe=recipe()).train
    assert (config.seed, config.caption.beam_size) == (4, 9), "the other sections stay"


KEPT = {
    "features": "f.h5",
    "annotations": "a.json",
    "val_features": "v.h5",
    "val_annotations": "b.json",
    "output": "out",
    "init_from": "old",
    "checkpoint_steps": 5,
    "checkpoint_minutes": 2.5,
    "precision": "float32",
    "device": "cpu",
    "grad_accum_steps": 3,
}


def test_a_recipe_leaves_where_things_are_and_on_what_they_run() -> None:
    assert set(KEPT) == NOT_OF_A_RECIPE
    path = write(yaml.safe_dump({"train": {**KEPT, "epochs": 99}}))
    train = load_config(path, recipe=recipe()).train.model_dump(mode="json")
    assert {key: train[key] for key in KEPT} == KEPT | {"output": "runs/my-recipe"}, "each recipe has its own folder"
    assert train["epochs"] == 3


def test_a_recipe_that_says_where_goes_over_the_file() -> None:
    path = write("train: {output: theirs, device: cpu}\n")
    train = load_config(path, recipe=recipe("train: {output: ours}")).train
    assert (train.output, train.device) == (Path("ours"), "cpu")


def test_every_key_is_either_of_a_recipe_or_not() -> None:
    assert set(TrainConfig.model_fields) > NOT_OF_A_RECIPE


def test_a_recipe_goes_over_pipeline_yaml_of_the_current_folder() -> None:
    write("train: {epochs: 9, device: cpu}\n", "pipeline.yaml")
    train = load_config(recipe=recipe()).train
    assert (train.epochs, train.device) == (3, "cpu")


@pytest.mark.parametrize("text", ["train:\n", "train: {decoder: }\n", "seed: 1\n", ""])
def test_a_recipe_goes_over_a_file_that_says_little(text: str) -> None:
    assert load_config(write(text), recipe=recipe()).train == load_config(recipe=recipe()).train


def test_set_and_flags_go_over_a_recipe() -> None:
    config = load_config(
        write("train: {epochs: 1, batch_size: 1}"),
        {"train.epochs": 5},
        ["train.learning_rate=0.25", "train.ema_decay=0.9"],
        recipe(),
    )
    train = config.train
    assert (train.epochs, train.learning_rate, train.ema_decay, train.batch_size) == (5, 0.25, 0.9, 32)
    assert train.schedule.step_size == 2


def test_options_by_set_go_over_the_decoder_of_a_recipe() -> None:
    decoder = load_config(None, None, ["train.decoder.dropout=0.5"], recipe()).train.decoder
    assert decoder == LstmConfig(hidden_size=48, dropout=0.5)


def test_another_family_by_flag_drops_the_options_of_the_recipes() -> None:
    decoder = load_config(None, {"train.decoder.family": "transformer"}, (), recipe()).train.decoder
    assert decoder == TransformerConfig()
    ours = load_config(None, {"train.decoder.family": "attention"}, (), "transformer").train.decoder
    assert ours == AttentionConfig(embed_size=512, dropout=0.1)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_ours_is_known_by_its_name(name: str) -> None:
    ours = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    if name != "scst":
        ours["train"]["output"] = f"runs/{name}"
    assert load_config(recipe=name) == PipelineConfig.model_validate(ours)


def test_a_file_may_be_named_like_a_recipe_of_ours() -> None:
    write("train: {epochs: 77}", "transformer")
    write("train: {epochs: 78}", "transformer.yaml")
    assert load_config(recipe="transformer").train.epochs != 77
    assert load_config(recipe="transformer.yaml").train.epochs == 78
    assert load_config(recipe="./transformer").train.epochs == 77


@pytest.mark.parametrize(
    ("name", "meant"),
    [("topdown", "top-down"), ("show-and-tel", "show-and-tell"), ("transfromer", "transformer"), ("SCST", None)],
)
def test_an_unknown_recipe_is_refused_with_the_one_that_is_meant(name: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe=name)
    assert caught.value.message == f"--recipe {name}: no such recipe, and no such file"
    if meant is None:
        assert all(known in caught.value.hint for known in recipe_names() if known != "scst")
    else:
        assert caught.value.hint == f"did you mean {meant}?"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("train: {epochs: 1}\nseed: 3\n", "seed"),
        ("caption: {beam_size: 1}\n", "caption"),
        ("epochs: 1\n", "epochs"),
    ],
)
def test_a_recipe_with_another_section_is_refused_naming_file_and_section(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write("seed: 1"), recipe=recipe(text))
    assert caught.value.message.startswith(f"my-recipe.yaml: {wrong}: ")
    assert ("pipeline.yaml" if "train:" in text else "`train:`") in caught.value.hint


@pytest.mark.parametrize("text", ["", "train:\n", "train: 5\n", "train: [epochs]\n"])
def test_a_recipe_without_a_train_section_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^my-recipe\.yaml: .*train"):
        load_config(recipe=recipe(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epohs: 1}", "train.epohs: unknown key"),
        ("train: {epochs: 0}", "train.epochs: "),
        ("train: {decoder: {family: lstm, attention_size: 3}}", "train.decoder.attention_size: unknown key"),
        ("train: {decoder: {family: transformer, heads: 3}}", "train.decoder: embed_size 256"),
        ("train: {schedule: {kind: noam}}", "train.schedule: noam"),
        ("train: [", "not valid YAML"),
        ("train: {epochs: 1, epochs: 2}", "not valid YAML"),
        ("- train", "must hold sections"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_of_its_file(text: str, message: str) -> None:
    """Also where a flag would have put it right."""
    for flags in ({}, {"train.epochs": 5, "train.decoder.family": "lstm"}):
        with pytest.raises(ConfigError) as caught:
            load_config(write("seed: 1"), flags, (), recipe(text))
        assert caught.value.message.startswith(f"my-recipe.yaml: {message}")


def test_what_is_wrong_in_the_file_beside_a_recipe_is_said_of_the_file() -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: train\.precision"):
        load_config(write("train: {precision: float8}"), recipe=recipe())
    with pytest.raises(ConfigError, match=r"^command line"):
        load_config(write("seed: 1"), {"train.epochs": 0}, (), recipe())


def test_a_folder_is_no_recipe() -> None:
    Path("mine").mkdir()
    with pytest.raises(ConfigError, match=r"^mine: "):
        load_config(recipe="mine")


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
