"""Reading the configuration: a file, a recipe, and what the command line says, each over the one before."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gridcap.common.config.data import SplitConfig
from gridcap.common.config.decoders import FAMILIES, AnyDecoderConfig, DecoderFamily
from gridcap.common.config.pipeline import PipelineConfig
from gridcap.common.config.train import NOT_OF_A_RECIPE
from gridcap.common.errors import ConfigError

DEFAULT_FILE = Path("pipeline.yaml")
_FAMILY = "train.decoder.family"


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
    path: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    recipe: str | None = None,
) -> PipelineConfig:
    """Read the configuration: file, then recipe, then `--set`, then flags, each over the one before.

    Args:
        path: a YAML file; None takes `pipeline.yaml` of the current folder if it is there, else defaults.
        recipe: the name of one of ours, or a YAML file with a `train` section: a decoder and how it is trained.
            It replaces all of the file's `train` section but where things are and on what they run.
        flags: values by key path, {"extract.batch_size": 16}.
        sets: "section.key=value" texts, the value in YAML.

    Raises:
        ConfigError: with the file and the key's path: not readable, unknown key, bad value, contradiction.
    """
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    tree = _read_yaml(path) if path is not None else {}
    if recipe is not None:
        _lay_recipe(tree, recipe)
    values: list[tuple[str, Any]] = []
    for text in sets:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"--set {text}: is not section.key=value", "write for example --set train.max_grad_norm=1.0"
            )
        if flags and key in flags:
            raise ConfigError(f"{key} is given twice: by its flag and by --set", "give it once")
        try:
            values.append((key, yaml.load(value, _UniqueKeyLoader)))
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {text}: the value is not YAML", "put quotes around it") from error
    values += (flags or {}).items()
    for key, value in sorted(values, key=lambda item: _is_option(item[0])):  # after the family they belong to
        _put(tree, key, value)
    return _validated(tree, path, {*(flags or {}), *(t.partition("=")[0] for t in sets)})


def _validated(tree: dict[str, Any], path: Path | None, from_command_line: set[str]) -> PipelineConfig:
    train = tree.get("train")
    if isinstance(train, dict) and train.get("decoder", 0) is None:
        train["decoder"] = {}
    decoder = train.get("decoder") if isinstance(train, dict) else None
    if isinstance(decoder, dict):
        decoder.setdefault("family", "attention")
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, path, tree, from_command_line) from error


def recipe_names() -> list[str]:
    """The recipes that come with Gridcap."""
    return sorted(file.name.removesuffix(".yaml") for file in _recipes() if file.name.endswith(".yaml"))


def _recipes() -> list[Any]:
    return list(resources.files("gridcap.recipes").iterdir())


def _lay_recipe(tree: dict[str, Any], recipe: str) -> None:
    """Put a recipe's `train` section over the file's, which keeps only what no recipe is about."""
    source = next((file for file in _recipes() if file.name == f"{recipe}.yaml"), Path(recipe))
    if isinstance(source, Path) and not source.exists():
        names = [name for name in recipe_names() if name != "scst"]
        close = difflib.get_close_matches(recipe, names, n=1, cutoff=0.5)
        if Path(f"{recipe}.yaml").exists():
            close = [f"{recipe}.yaml"]
        raise ConfigError(
            f"--recipe {recipe}: no such recipe, and no such file",
            f"did you mean {close[0]}?" if close else f"recipes: {', '.join(names)}, or a YAML file",
        )
    laid = _read_yaml(source)
    if others := [str(key) for key in laid if key != "train"]:
        keys = "put the keys under `train:`" if "train" not in laid else "move it to pipeline.yaml"
        raise ConfigError(f"{source}: {others[0]}: a recipe holds train and nothing else", keys)
    if not isinstance(laid.get("train"), dict):
        raise ConfigError(f"{source}: a recipe holds a section train, with keys", "see pipeline.yaml for what it takes")
    _validated({"train": dict(laid["train"])}, Path(str(source)), set())
    before = tree.get("train")
    kept = {key: before[key] for key in NOT_OF_A_RECIPE if key in before} if isinstance(before, dict) else {}
    if laid["train"].get("objective") != "scst":
        kept["output"] = f"runs/{Path(recipe).stem}"
    tree["train"] = kept | laid["train"]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ConfigError(f"{path}: {reason}", "give the path of a YAML file with --config or --recipe") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    if key == _FAMILY:
        for option in _options(tree.get("family", "attention")) - _options(value):
            tree.pop(option, None)
    tree[last] = value


def _is_option(key: str) -> bool:
    return key.startswith("train.decoder.") and key != _FAMILY


def _options(family: Any) -> set[str]:
    return set(FAMILIES.get(str(family), AnyDecoderConfig).model_fields)


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
    shown = first["input"] if not isinstance(first["input"], dict) else first.get("ctx", {}).get("tag")
    given = "" if shown is None else f" (given: {shown!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    where = f"{key}: " if key else ""
    return ConfigError(f"{source}: {where}{message}{given}{more}", "see pipeline.yaml for what each key takes")


def _keys_at(parts: list[str], tree: Mapping[str, Any]) -> list[str]:
    """The keys a section knows, for "did you mean"."""
    if parts[:2] == ["data", "splits"]:
        return list(SplitConfig.model_fields)
    if parts == ["train", "decoder"]:
        return list(FAMILIES[tree["train"]["decoder"]["family"]].model_fields)
    model: Any = PipelineConfig
    for part in parts:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def describe_key(key: str) -> FieldInfo:
    """The field (description, default, type) of a key such as "extract.batch_size"."""
    if key == _FAMILY:
        return FieldInfo(
            annotation=DecoderFamily,
            default="attention",
            description="the decoder's family: attention over the cells, lstm, or transformer",
        )
    model: Any = PipelineConfig
    *parents, last = key.split(".")
    for part in parents:
        model = model.model_fields[part].annotation
    field: FieldInfo = model.model_fields[last]
    return field
