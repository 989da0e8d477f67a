"""Keys of the configuration: their fields, and suggestions for unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from inspect import isclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from gridcap.common.config.data import SplitConfig
from gridcap.common.config.decoders import DecoderConfig, DecoderSettings
from gridcap.common.config.pipeline import PipelineConfig
from gridcap.common.config.section import Section

DECODER = "train.decoder"
FAMILY_KEY = f"{DECODER}.family"

Decoders = Mapping[str, type[DecoderConfig]]  # family -> its settings; empty: those of the decoder are not checked

# Old key -> new key. Only for suggestions: old keys are not accepted.
RENAMED_KEYS = {
    "extract.decoder": "extract.jpeg_decoder",
    "extract.geometry": "extract.resize_mode",
    "extract.readers": "extract.num_workers",
    "data.max_bad": "data.max_invalid",
    "data.features": "data.features_dir",
    "train.decoder.doubly_stochastic": "train.decoder.attention_reg",
    "train.decoder.output": "train.decoder.output_layer",
    "train.decoder.gate": "train.decoder.context_gate",
    "train.decoder.image": "train.decoder.image_injection",
    "train.decoder.blind": "train.decoder.zero_features",
    "train.accumulate": "train.grad_accum_steps",
    "train.ema": "train.ema_decay",
    "train.clip_norm": "train.max_grad_norm",
    "train.clip_value": "train.max_grad_value",
    "train.schedule.every": "train.schedule.step_size",
    "train.schedule.factor": "train.schedule.gamma",
    "train.scheduled_sampling.max": "train.scheduled_sampling.max_prob",
    "train.scheduled_sampling.increase": "train.scheduled_sampling.prob_step",
    "train.scheduled_sampling.every": "train.scheduled_sampling.step_epochs",
    "caption.search": "caption.decoding",
    "caption.consensus": "caption.mbr",
}


def describe_key(key: str) -> FieldInfo:
    """Return the field (description, default, type) of a key such as "extract.batch_size"."""
    if key == FAMILY_KEY:
        return FieldInfo(
            annotation=str,
            default=DecoderSettings().family,
            description="decoder family: attention (recurrent, attends to the cells), lstm, transformer, or one of an "
            "installed package",
        )
    model: Any = PipelineConfig
    *parents, last = key.split(".")
    for part in parents:
        model = model.model_fields[part].annotation
    field: FieldInfo = model.model_fields[last]
    return field


def keys_of_section(section: str, tree: Mapping[str, Any], decoders: Decoders) -> list[str]:
    """Return the names of the keys in a section ("" for the top level), given the values as a tree.

    The result is empty if there is no such section: an unknown key of a file may contain a dot itself (``trai.: 1``).
    """
    if section.startswith("data.splits"):
        return list(SplitConfig.model_fields)
    if section == DECODER:
        return list(decoders.get(family_of(tree), DecoderConfig).model_fields)
    model: Any = PipelineConfig
    for part in section.split(".") if section else ():
        if part not in getattr(model, "model_fields", ()):
            return []
        model = model.model_fields[part].annotation
    return list(getattr(model, "model_fields", ()))


def family_of(tree: Mapping[str, Any]) -> str:
    """Return the decoder family in a tree of values."""
    train = tree.get("train")
    decoder = train.get("decoder") if isinstance(train, Mapping) else None
    default = DecoderSettings().family
    return str(decoder.get("family", default)) if isinstance(decoder, Mapping) else default


def all_keys(decoders: Decoders, model: type[Section] = PipelineConfig, prefix: str = "") -> Iterator[str]:
    """Yield every key path, in the order of the sections, without those of splits."""
    for name, field in model.model_fields.items():
        types = [t for t in (get_args(field.annotation) or (field.annotation,)) if isclass(t) and not get_args(t)]
        sections = [t for t in types if issubclass(t, Section) and t is not SplitConfig]
        if f"{prefix}{name}" == DECODER:
            sections = list(decoders.values()) or [DecoderConfig]
        for section in sections:
            yield from all_keys(decoders, section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}"


def suggest_keys(key: str, tree: Mapping[str, Any], decoders: Decoders) -> list[str]:
    """Return the keys that an unknown key may refer to; empty if none is similar.

    In this order: the new name of a renamed key, keys of the same name in other sections, similar keys of the same
    section, keys whose initials are the name (``lr``), and similar keys in other sections.
    """
    section, _, name = key.rpartition(".")
    in_section = keys_of_section(section, tree, decoders)
    prefix = f"{section}." if section else ""
    renamed = RENAMED_KEYS.get(key) or RENAMED_KEYS.get(f"train.{key}") or RENAMED_KEYS.get(f"train.decoder.{key}")
    if renamed and (not renamed.startswith("train.decoder.") or renamed.rpartition(".")[2] in in_section):
        return [renamed]
    known = list(dict.fromkeys(all_keys(decoders)))
    same_name = [other for other in known if other.rpartition(".")[2] == name and other != key]
    if same_name:
        return same_name
    if similar := difflib.get_close_matches(name, in_section, n=1, cutoff=0.5):
        return [prefix + similar[0]]
    initials = [other for other in known if "".join(w[0] for w in other.rpartition(".")[2].split("_")) == name]
    names = {other.rpartition(".")[2]: other for other in reversed(known)}
    return initials[:3] or [names[match] for match in difflib.get_close_matches(name, names, n=1, cutoff=0.7)]
