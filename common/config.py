"""The configuration of a whole run: one file, typed, refused when it contradicts itself.

`load_config` reads the file, lays flags over it, and returns a `PipelineConfig`. Every command uses the same
file, so a key means the same thing everywhere. Relative paths are relative to the current folder.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from common.errors import ConfigError

DEFAULT_FILE = Path("pipeline.yaml")

Precision = Literal["auto", "float32", "bfloat16", "float16"]
TrainPrecision = Literal["auto", "float32", "bfloat16"]
StoredType = Literal["float16", "float32", "uint8"]
View = Literal["original", "hflip"]
Geometry = Literal["stretch", "crop", "letterbox"]
Compile = Literal["auto", "on", "off"]
JpegDecoder = Literal["pillow", "nvjpeg"]
EncoderName = Literal["inception_v3", "resnet50", "resnet101", "resnet152"]


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_no_change(cls, value: Any) -> Any:
        return {} if value is None else value  # a section whose keys were all deleted


class SplitConfig(Section):
    """Where one split's images and captions are."""

    images: Path = Field(description="folder with the images")
    annotations: Path | None = Field(
        None, description="captions file: COCO JSON, Karpathy's dataset_coco.json, or CSV image,caption"
    )
    limit: PositiveInt | None = Field(None, description="take a seeded random subset of this many images")
    skip: int = Field(
        0, ge=0, description="leave out this many images of the same random order first: disjoint subsets of one file"
    )


class DataConfig(Section):
    """The data set: its splits and where their features go."""

    splits: dict[str, SplitConfig] = Field({}, description="name of the split -> its images and captions")
    features: Path = Field(Path("features"), description="folder of the feature stores, <split>.h5 each")
    max_bad: str = Field(
        "20%", description="stop when more than this many images or annotations are bad: a number, or a share as 5%"
    )

    @field_validator("max_bad", mode="before")
    @classmethod
    def _number_or_share(cls, value: Any) -> str:
        if not re.fullmatch(r"\d+|\d+(\.\d+)?%", str(value)):
            raise ValueError("must be a number of items like 10, or a share like 5%")
        return str(value)


def allowed_bad(max_bad: str, total: int) -> float:
    """How many of `total` items may be bad under a `max_bad` setting like "10" or "5%"."""
    return float(max_bad[:-1]) / 100 * total if max_bad.endswith("%") else float(max_bad)


class ExtractConfig(Section):
    """Stage one: images to grid features."""

    encoder: EncoderName = Field("inception_v3", description="the frozen CNN, from torchvision")
    weights: str = Field(
        "imagenet",
        description="imagenet (downloaded once), random[:SEED] (demo and tests only), or a .pth / .safetensors file",
    )
    geometry: Geometry = Field("stretch", description="how an image becomes square")
    precision: Precision = Field(
        "auto", description="arithmetic of the encoder; auto: bfloat16 where the hardware has it"
    )
    compile: Compile = Field(
        "auto", description="torch.compile for the encoder; auto: where a job of this size is known to gain by it"
    )
    decoder: JpegDecoder = Field(
        "pillow", description="what decodes JPEG files: pillow, or nvjpeg (on the GPU; other pixels in the last digit)"
    )
    dtype: StoredType = Field(
        "float16", description="number type of the stored grids; uint8: half of float16, a scale per channel and image"
    )
    views: tuple[View, ...] = Field(
        ("original",), description="what to store of each image: original, or original,hflip (mirrored too)"
    )
    shard_size: PositiveInt = Field(1024, description="images in one shard")
    batch_size: PositiveInt = Field(32, description="images encoded together; a batch never crosses a shard's border")
    readers: PositiveInt = Field(4, description="threads that decode images")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_reads_on_and_off_as_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return "on" if value else "off"
        return value

    @field_validator("views", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [view.strip() for view in value.split(",")] if isinstance(value, str) else value

    @field_validator("views")
    @classmethod
    def _original_first(cls, value: tuple[View, ...]) -> tuple[View, ...]:
        if value[:1] != ("original",) or len(set(value)) < len(value):
            raise ValueError("must begin with original and name no view twice")
        return value

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, value: str) -> str:
        if value.startswith("random") and not re.fullmatch(r"random(:\d+)?", value) and not Path(value).exists():
            raise ValueError("must be imagenet, random, random:SEED with a whole number, or a file")
        if not value.startswith(("imagenet", "random")) and not Path(value).suffix and not Path(value).exists():
            raise ValueError("must be imagenet, random, random:SEED, or the path of a .pth or .safetensors file")
        return value

    @model_validator(mode="after")
    def _half_needs_gpu(self) -> ExtractConfig:
        if self.precision == "float16" and self.device == "cpu":
            raise ValueError("precision float16 needs a GPU, and device is cpu: choose auto, float32 or bfloat16")
        return self

    @model_validator(mode="after")
    def _nvjpeg_needs_gpu(self) -> ExtractConfig:
        if self.decoder == "nvjpeg" and self.device == "cpu":
            raise ValueError("decoder nvjpeg needs a GPU, and device is cpu: choose pillow")
        return self


class VocabularyConfig(Section):
    """Which words the decoder knows; counted over the training split only."""

    max_size: int | None = Field(5000, ge=5, description="keep the commonest words up to this size, specials included")
    min_count: PositiveInt = Field(1, description="leave out words seen fewer times than this (5 is the field's habit)")


class _Decoder(Section):
    embed_size: PositiveInt = Field(256, description="size of a word embedding")
    hidden_size: PositiveInt = Field(512, description="size of the recurrent state")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout on the grid, the embeddings and before the output")
    blind: bool = Field(False, description="replace the grid by zeros: the baseline that knows only the language")


class LstmConfig(_Decoder):
    """LSTM whose initial state is made from the pooled grid."""

    family: Literal["lstm"] = "lstm"


class AttentionConfig(_Decoder):
    """GRU with Bahdanau attention over the grid's cells."""

    family: Literal["attention"] = "attention"
    attention_size: PositiveInt = Field(256, description="size of the space in which state and cells are compared")


DecoderConfig = Annotated[LstmConfig | AttentionConfig, Field(discriminator="family")]
DecoderFamily = Literal["lstm", "attention"]


class TrainConfig(Section):
    """Stage two: grid features and captions to a decoder."""

    features: Path | None = Field(None, description="feature store to train on  [default: <data.features>/train.h5]")
    annotations: Path | None = Field(
        None, description="its captions  [default: those of the store's split in data.splits]"
    )
    val_features: Path | None = Field(
        None, description="feature store to validate on  [default: <data.features>/val.h5 if it is there]"
    )
    val_annotations: Path | None = Field(None, description="its captions  [default: as for annotations]")
    output: Path = Field(Path("runs/attention"), description="folder of the run: checkpoints, metrics, configuration")
    decoder: DecoderConfig = Field(AttentionConfig(), description="the decoder and its sizes")
    vocabulary: VocabularyConfig = VocabularyConfig()
    captions_per_image: PositiveInt = Field(5, description="captions of one image trained on together")
    max_length: PositiveInt = Field(30, description="longer captions are cut to this many words")
    epochs: PositiveInt = Field(20, description="passes over the training split")
    batch_size: PositiveInt = Field(32, description="images in a batch")
    learning_rate: PositiveFloat = Field(1e-3, description="Adam's step size")
    clip_norm: PositiveFloat = Field(5.0, description="gradients are scaled down to at most this norm")
    precision: TrainPrecision = Field("auto", description="auto: bfloat16 where the hardware has it, else float32")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")


class CaptionConfig(Section):
    """How captions are decoded, in evaluation and for new photographs."""

    beam_size: PositiveInt = Field(3, description="hypotheses kept per image; 1 is greedy search")
    max_length: PositiveInt = Field(30, description="longest caption, in words")
    length_penalty: float = Field(
        0.7, ge=0, description="log-probability is divided by length to this power: 0 favours short captions"
    )
    batch_size: PositiveInt = Field(50, description="images decoded together")


class PipelineConfig(Section):
    """One complete run: data, extract, train, caption."""

    seed: int = Field(0, ge=0, description="seed of subsets, initial weights, epoch order and dropout")
    data: DataConfig = DataConfig()
    extract: ExtractConfig = ExtractConfig()
    train: TrainConfig = TrainConfig()
    caption: CaptionConfig = CaptionConfig()

    def to_yaml(self, *sections: str) -> str:
        """The resolved values as YAML; only the named sections (and the seed) if any are named."""
        values = self.model_dump(mode="json")
        chosen = {k: v for k, v in values.items() if not sections or k in ("seed", *sections)}
        return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=100)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, which plain YAML settles by silently taking the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return node


def load_config(
    path: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> PipelineConfig:
    """Read the configuration: file, then `--set`, then flags, each over the one before.

    Args:
        path: a YAML file; None takes `pipeline.yaml` of the current folder if it is there, else defaults.
        flags: values by key path, {"extract.batch_size": 16}.
        sets: "section.key=value" texts, the value in YAML.

    Raises:
        ConfigError: with the file and the key's path: not readable, unknown key, bad value, contradiction.
    """
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    tree = _read_yaml(path) if path is not None else {}
    values: list[tuple[str, Any]] = []
    for text in sets:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text}: is not section.key=value", "write for example --set train.clip_norm=1.0")
        if flags and key in flags:
            raise ConfigError(f"{key} is given twice: by its flag and by --set", "give it once")
        try:
            values.append((key, yaml.load(value, _UniqueKeyLoader)))
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {text}: the value is not YAML", "put quotes around it") from error
    values += (flags or {}).items()
    for key, value in sorted(values, key=lambda item: item[0] != "train.decoder.family"):  # the family first
        _put(tree, key, value)
    train = tree.get("train")
    if isinstance(train, dict) and train.get("decoder", 0) is None:
        train["decoder"] = {}
    decoder = train.get("decoder") if isinstance(train, dict) else None
    if isinstance(decoder, dict):
        decoder.setdefault("family", "attention")
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, path, tree, {*(flags or {}), *(t.partition("=")[0] for t in sets)}) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ConfigError(f"{path}: {reason}", "give the path of a YAML file with --config") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}", "mend the file there") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections (seed, data, extract, train, caption)", "see pipeline.yaml")
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its key path. Choosing another decoder family drops the options of the one in the file."""
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    if key == "train.decoder.family" and tree.get("family", "attention") != value:
        shared = set(_Decoder.model_fields)
        for option in [name for name in tree if name not in shared]:
            del tree[option]
    tree[last] = value


def _explain(
    error: ValidationError, path: Path | None, tree: Mapping[str, Any], from_command_line: set[str]
) -> ConfigError:
    """One line for the first problem: file, key path, what is wrong; and what to do."""
    first = error.errors()[0]
    parts = [str(p) for p in first["loc"]]
    if parts[:2] == ["train", "decoder"] and len(parts) > 2 and parts[2] in get_args(DecoderFamily):
        del parts[2]  # pydantic names the union's branch, which is no key
    if first["type"] == "union_tag_invalid":
        parts.append("family")
    key = ".".join(parts)
    if path is None or any(f"{key}.".startswith(f"{given}.") for given in from_command_line):
        source = "command line"
    elif any(given.startswith(f"{key}.") for given in from_command_line):
        source = f"command line over {path}"
    else:
        source = str(path)
    if first["type"] == "extra_forbidden":
        known = _keys_at(parts[:-1], tree)
        close = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return ConfigError(f"{source}: {key}: unknown key", hint)
    message = first["msg"].removeprefix("Value error, ")
    shown = first["input"] if not isinstance(first["input"], dict) else first.get("ctx", {}).get("tag", "a section")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    where = f"{key}: " if key else ""
    return ConfigError(
        f"{source}: {where}{message} (given: {shown!r}){more}", "see pipeline.yaml for what each key takes"
    )


def _keys_at(parts: list[str], tree: Mapping[str, Any]) -> list[str]:
    """The keys a section knows, for "did you mean"."""
    if parts[:2] == ["data", "splits"]:
        return list(SplitConfig.model_fields)
    if parts == ["train", "decoder"]:
        family = tree.get("train", {}).get("decoder", {}).get("family")
        return list((LstmConfig if family == "lstm" else AttentionConfig).model_fields)
    model: Any = PipelineConfig
    for part in parts:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def describe_key(key: str) -> FieldInfo:
    """The field (description, default, type) of a key such as "extract.batch_size"."""
    if key == "train.decoder.family":
        return FieldInfo(
            annotation=DecoderFamily,
            default="attention",
            description="lstm (image to the initial state), or attention (a GRU with Bahdanau attention)",
        )
    model: Any = PipelineConfig
    *parents, last = key.split(".")
    for part in parents:
        model = model.model_fields[part].annotation
    field: FieldInfo = model.model_fields[last]
    return field
