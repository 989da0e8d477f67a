"""Invalid settings and files are errors that name their source and key."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gridcap.common import config as config_package
from gridcap.common.config import PipelineConfig, SplitConfig, max_invalid_count
from gridcap.common.config.keys import RENAMED_KEYS, all_keys
from gridcap.common.errors import ConfigError, PathError
from gridcap.train.decoders.registry import DECODER_CONFIGS, resolve_decoder

load_config = partial(config_package.load_config, decoders=DECODER_CONFIGS)
DEFAULTS = resolve_decoder(PipelineConfig())


def write(text: str, name: str = "mine.yaml") -> Path:
    """Write a configuration file to the (temporary) current folder."""
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("sed: 1", "sed", "seed"),
        ("extrac: {batch_size: 1}", "extrac", "extract"),
        ("extract: {batchsize: 1}", "extract.batchsize", "extract.batch_size"),
        ("train: {vocabulary: {mincount: 1}}", "train.vocabulary.mincount", "train.vocabulary.min_count"),
        ("train: {decoder: {hiden_size: 1}}", "train.decoder.hiden_size", "train.decoder.hidden_size"),
        ("train: {decoder: {family: lstm, droput: 0}}", "train.decoder.droput", "train.decoder.dropout"),
        ("data: {splits: {train: {images: x, limt: 1}}}", "data.splits.train.limt", "data.splits.train.limit"),
        ("data: {split: {}}", "data.split", "data.splits"),
        ("train: {decoder: {family: transformer, head: 2}}", "train.decoder.head", "train.decoder.heads"),
        ("train: {schedule: {warmup: 1}}", "train.schedule.warmup", "train.schedule.warmup_steps"),
        ("train: {scst: {sample: 1}}", "train.scst.sample", "train.scst.samples"),
        ("caption: {beam: 1}", "caption.beam", "caption.beam_size"),
    ],
)
def test_an_unknown_key_suggests_a_similar_key(text: str, key: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.message == f"mine.yaml: {key}: unknown key; did you mean {suggestion}?"


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED_KEYS.items()))
def test_a_renamed_key_suggests_its_new_name(old: str, new: str) -> None:
    sets = ["train.decoder.family=lstm"] if old == "train.decoder.image" else []
    with pytest.raises(ConfigError) as caught:
        load_config(None, None, [*sets, f"{old}=1"])
    assert caught.value.message == f"command line: {old}: unknown key; did you mean {new}?"


def test_renamed_keys_exist() -> None:
    assert set(RENAMED_KEYS.values()) <= set(all_keys(DECODER_CONFIGS))
    assert not set(RENAMED_KEYS) & set(all_keys(DECODER_CONFIGS))


@pytest.mark.parametrize(
    ("key", "suggestions"),
    [
        ("learning_rate", "train.learning_rate"),
        ("lr", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("learning_rte", "train.learning_rate"),
        ("batch_size", "extract.batch_size, train.batch_size or caption.batch_size"),
        ("train.num_workers", "extract.num_workers"),
        ("train.seed", "seed"),
        ("clip_norm", "train.max_grad_norm"),
    ],
)
def test_item_23_a_key_in_the_wrong_section_suggests_the_right_one(key: str, suggestions: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, None, [f"{key}=1"])
    assert caught.value.message == f"command line: {key}: unknown key; did you mean {suggestions}?"


def test_an_unknown_key_without_a_similar_key_lists_the_known_keys() -> None:
    with pytest.raises(ConfigError, match=r"caption\.zzz: unknown key") as caught:
        load_config(write("caption: {zzz: 1}"))
    assert "decoding, beam_size, max_length" in caught.value.hint


def test_an_unknown_key_given_by_set_is_attributed_to_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"^command line: extract\.batchsize: unknown key"):
        load_config(write("seed: 1"), None, ["extract.batchsize=3"])


def test_an_option_of_another_family_names_the_family_that_has_it() -> None:
    with pytest.raises(ConfigError, match=r"train\.decoder\.attention_size: unknown key for family lstm") as caught:
        load_config(write("train: {decoder: {family: lstm, attention_size: 64}}"))
    assert "train.decoder.family=attention" in caught.value.hint


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
        ("extract: {image_size: 0}", "extract.image_size"),
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
        ("train: {optimizer: sgdm}", "train.optimizer"),
        ("train: {shuffle: all}", "train.shuffle"),
        ("train: {grad_accum_steps: 0}", "train.grad_accum_steps"),
        ("train: {weight_decay: -1}", "train.weight_decay"),
        ("train: {schedule: {kind: lineal}}", "train.schedule.kind"),
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
def test_an_invalid_value_names_the_file_and_the_key(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.message.startswith(f"mine.yaml: {key}: ")
    assert caught.value.hint


def test_an_unknown_family_lists_the_families() -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: train\.decoder\.family: .*attention, lstm or transformer"):
        load_config(write("train: {decoder: {family: gpt}}"))


@pytest.mark.parametrize("family", ["[lstm]", "{lstm: 1}", "5", "null"])
def test_a_family_that_is_not_a_name_is_an_error(family: str) -> None:
    for sets in ([f"train.decoder.family={family}"], [f"train.decoder={{family: {family}}}"]):
        with pytest.raises(ConfigError, match=r"^command line: train\.decoder"):
            load_config(None, None, sets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {decoder: {family: transformer, heads: 7}}", "train.decoder: embed_size 256 is not a multiple of"),
        ("train: {schedule: {kind: noam, warmup_steps: 0}}", "train.schedule: noam requires warmup_steps"),
        ("caption: {temperature: 0.5}", "caption: temperature, top_k, and top_p require decoding: sample"),
        ("caption: {top_k: 5}", "caption: temperature, top_k, and top_p require decoding: sample"),
        ("caption: {decoding: beam, top_p: 0.9}", "caption: temperature, top_k, and top_p require decoding: sample"),
        ("caption: {decoding: sample, block_trigrams: true}", "caption: block_trigrams requires decoding: beam"),
        ("caption: {decoding: sample, mbr: true}", "caption: mbr requires decoding: beam"),
        ("caption: {beam_size: 2, mbr: true}", "caption: mbr requires decoding: beam and a beam_size"),
    ],
)
def test_contradictory_settings_are_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.message.startswith(f"mine.yaml: {message}")


@pytest.mark.parametrize(
    "text",
    [
        "train: {decoder: {family: transformer, embed_size: 21, heads: 7}}",
        "train: {schedule: {kind: noam, warmup_steps: 1}}",
        "train: {schedule: {kind: linear}}",
        "caption: {decoding: sample, temperature: 0.5, top_k: 5, top_p: 0.9}",
        "caption: {decoding: beam, temperature: 1.0, block_trigrams: true}",
        "train: {objective: scst}",
    ],
)
def test_consistent_settings_are_accepted(text: str) -> None:
    assert load_config(write(text)) != DEFAULTS


def test_an_error_counts_further_errors() -> None:
    with pytest.raises(ConfigError, match=r"given: -3\) \(and 1 more\)"):
        load_config(write("extract: {batch_size: -3, num_workers: 0}"))


@pytest.mark.parametrize("weights", ["imagenet", "random", "random:12", "mine.pth", "randomized.safetensors"])
def test_weights_accept_a_name_a_seed_or_a_file(weights: str) -> None:
    Path("randomized.safetensors").touch()
    assert load_config(None, {"extract.weights": weights}).extract.weights == weights


def test_float16_on_the_cpu_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"extract: precision float16 requires a GPU"):
        load_config(write("extract: {precision: float16, device: cpu}"))
    assert load_config(write("extract: {precision: float16, device: cuda}")).extract.precision == "float16"
    assert load_config(write("extract: {precision: bfloat16, device: cpu}")).extract.precision == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "sets"),
    [
        ({"extract.precision": "float16", "extract.device": "cpu"}, []),
        ({}, ["train.decoder.family=gpt"]),
        ({"train.decoder.family": "transformer"}, ["train.decoder.heads=3"]),
        ({}, ["train.schedule={kind: noam, warmup_steps: 0}"]),
        ({"data.splits.mine": {"images": None}}, []),
        ({}, ["extract={batch_size: 0}"]),
    ],
)
def test_errors_on_the_command_line_are_not_attributed_to_the_file(flags: dict[str, Any], sets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^command line"):
        load_config(write("seed: 1"), flags, sets)


@pytest.mark.parametrize("text", ["seed: 1\nseed: 1\n", "train:\n  epochs: 1\n  output: x\n  epochs: 2\n"])
def test_a_duplicate_key_names_the_key_and_the_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml.*duplicate key '(seed|epochs)'.*line"):
        load_config(write(text))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"seed: [\n", "invalid YAML"),
        (b"seed:\t1\n\tepochs: 2\n", "invalid YAML"),
        (b"seed: !!python/object:os.system {}\n", "invalid YAML"),
        (b"seed: 1\0", "invalid YAML"),
        (b"[" * 100_000, "invalid YAML"),
        (b"\xff\xfe\x00", "not a UTF-8 text file"),
        (b"- seed\n", "must contain sections"),
        (b"just words\n", "must contain sections"),
    ],
)
def test_an_invalid_file_is_an_error_with_its_name(content: bytes, why: str) -> None:
    Path("mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^mine\.yaml: {why}"):
        load_config(Path("mine.yaml"))


def test_a_missing_file_is_an_error_with_its_name() -> None:
    with pytest.raises(PathError, match=r"^nowhere\.yaml: no such file") as caught:
        load_config(Path("nowhere.yaml"))
    assert "--config" in caught.value.hint


def test_item_13_a_failed_read_is_not_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(errno.EIO, "Input/output error", "mine.yaml")

    path = write("seed: 1")
    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_config(path)


def test_yaml_anchors_and_merges_work() -> None:
    text = "data:\n  splits:\n    val: &coco {images: x, limit: 5}\n    test: {<<: *coco, skip: 5}\n"
    assert load_config(write(text)).data.splits["test"] == SplitConfig(images=Path("x"), limit=5, skip=5)


@pytest.mark.parametrize("text", ["extract:\n", "train:\n  vocabulary:\n  decoder:\n", "data:\n  # features: x\n"])
def test_an_empty_section_has_the_defaults(text: str) -> None:
    assert load_config(write(text)) == DEFAULTS


@pytest.mark.parametrize("by_set", [False, True])
def test_an_impossible_date_is_invalid_yaml(by_set: bool) -> None:
    text = "train.output=2026-99-01"
    path = write("{}" if by_set else "train: {output: 2026-99-01}")
    with pytest.raises(ConfigError, match="2026-99-01" if by_set else "invalid YAML"):
        load_config(path, None, [text] if by_set else [])


@pytest.mark.parametrize(
    ("max_invalid", "total", "allowed"),
    [("0", 50, 0), ("10", 50, 10), ("10", 5, 10), ("20%", 50, 10), ("0%", 50, 0), ("2.5%", 200, 5)],
)
def test_max_invalid_is_a_count_or_a_share(max_invalid: str, total: int, allowed: float) -> None:
    assert max_invalid_count(max_invalid, total) == pytest.approx(allowed)
