"""Recipes: a decoder and its training settings."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from gridcap.common.config.keys import Decoders
from gridcap.common.config.train import RUN_SETTINGS
from gridcap.common.config.validate import validate
from gridcap.common.config.yaml_file import read_yaml
from gridcap.common.errors import ConfigError


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(_built_in_recipes())


def read_recipe(name: str) -> str:
    """Return the YAML text of a built-in recipe. Its first line is a comment that names the source.

    Raises:
        ConfigError: if there is no built-in recipe of that name.
    """
    recipes = _built_in_recipes()
    if name not in recipes:
        similar = difflib.get_close_matches(name, recipes, n=1, cutoff=0.5)
        hint = f"did you mean {similar[0]}?" if similar else f"recipes: {', '.join(sorted(recipes))}"
        raise ConfigError(f"{name}: no such recipe", hint)
    return recipes[name].read_text(encoding="utf-8")


def apply_recipe(tree: dict[str, Any], recipe: str, decoders: Decoders | None = None) -> None:
    """Replace the `train` section of a tree by that of a recipe, except for the settings of the run.

    Args:
        tree: section -> key -> value; modified in place.
        recipe: name of a built-in recipe, or path of a YAML file with a `train` section.
        decoders: as for `load_config`.

    Raises:
        ConfigError: if the recipe does not exist or is invalid.
    """
    path = _built_in_recipes().get(recipe) or Path(recipe)
    if not path.exists():
        names = [name for name in recipe_names() if name != "scst"]  # scst has a flag of its own
        similar = difflib.get_close_matches(recipe, names, n=1, cutoff=0.5)
        if Path(f"{recipe}.yaml").exists():
            similar = [f"{recipe}.yaml"]
        hint = f"did you mean {similar[0]}?" if similar else f"recipes: {', '.join(names)}, or a YAML file"
        raise ConfigError(f"--recipe {recipe}: no such recipe or file", hint)
    values = read_yaml(path)
    if others := [str(key) for key in values if key != "train"]:
        hint = "put the keys under `train:`" if "train" not in values else "move it to pipeline.yaml"
        raise ConfigError(f"{path}: {others[0]}: a recipe contains only the section train", hint)
    if not isinstance(values.get("train"), dict):
        raise ConfigError(f"{path}: a recipe needs a section train with keys", "see pipeline.yaml for the keys")
    validate({"train": values["train"]}, path, {}, decoders)
    previous = tree.get("train")
    kept = {key: previous[key] for key in RUN_SETTINGS if key in previous} if isinstance(previous, dict) else {}
    if values["train"].get("objective") != "scst":
        kept["output"] = f"runs/{Path(recipe).stem}"
    tree["train"] = kept | values["train"]


def _built_in_recipes() -> dict[str, Path]:
    """Return name -> file."""
    folder = Path(str(resources.files("gridcap.recipes")))
    return {path.stem: path for path in folder.glob("*.yaml")}
