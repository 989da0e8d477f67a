"""Imports run one way, and what needs no torch loads without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
ALLOWED = {  # package of ours -> the other packages of ours that it may import
    "common": set(),
    "extract": {"common"},
    "train": {"common"},
    "caption": {"extract", "train", "common"},
    "recipes": set(),  # YAML files that common.config reads; nobody imports it
}
OTHERS = {"demo", "bench", "torture", "tests"}  # ours too, and imported by none of the above


def imported(source: str, package: str) -> set[str]:
    """Every module that a source text may import, wherever the statement stands, relative names resolved.

    `from a import b` gives both "a" and "a.b", since b may be a module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{above}.{base}".rstrip(".")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def forbidden(source: str, package: str) -> list[str]:
    """The imports in a module of `package` (dotted) that the design does not allow."""
    top = package.split(".")[0]
    may = {top, *ALLOWED[top]} if top in ALLOWED else {*ALLOWED, *OTHERS}
    bad = []
    for name in imported(source, package):
        first, *rest = name.split(".")
        if first in {*ALLOWED, *OTHERS} and (first not in may or "cli" in rest):
            bad.append(name)
    return sorted(bad)


def modules() -> list[Path]:
    """Every module of ours but the tests, relative to the repository."""
    folders = [ROOT / name for name in sorted({*ALLOWED, *OTHERS} - {"tests"})]
    return [path.relative_to(ROOT) for folder in folders for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize("module", modules(), ids=str)
def test_a_module_imports_only_what_its_package_may(module: Path) -> None:
    source = (ROOT / module).read_text(encoding="utf-8")
    assert forbidden(source, ".".join(module.parent.parts)) == []


def test_every_package_is_looked_at() -> None:
    """A new top-level package must be given its place in ALLOWED."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(ALLOWED) <= packages <= {*ALLOWED, *OTHERS}
    assert set(ALLOWED) <= {path.parts[0] for path in modules()}


def test_every_package_is_installed_with_its_files() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {
        ".".join(path.relative_to(ROOT).parent.parts) for name in ALLOWED for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found
    assert {"common.config", "train.decoders", "recipes"} <= found
    inside = {path.parent for name in ALLOWED for path in (ROOT / name).rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in inside} == found, "a folder with code is a package"
    files = {path.relative_to(ROOT) for name in ALLOWED for path in (ROOT / name).rglob("*") if path.is_file()}
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert {path for path in data if path.suffix != ".yaml"} == {Path("common/report.html")}
    assert {path.parent for path in data if path.suffix == ".yaml"} == {Path("recipes")}
    assert settings["package-data"] == {"common": ["report.html"], "recipes": ["*.yaml"]}


def test_recipes_hold_no_code() -> None:
    files = {path.name for path in (ROOT / "recipes").iterdir() if path.name != "__pycache__"}
    assert {name for name in files if not name.endswith(".yaml")} == {"__init__.py"}
    (only,) = ast.parse((ROOT / "recipes" / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant), "a docstring"


@pytest.mark.parametrize(
    ("package", "source", "bad"),
    [
        ("extract", "import numpy, common.store\nfrom gridcap.common import config", []),
        ("extract", "from train.loop import fit", ["gridcap.train.engine.loop", "gridcap.train.engine.loop.fit"]),
        ("extract", "def f():\n    import train", ["train"]),
        ("extract", "if TYPE_CHECKING:\n    from caption import captioner", ["caption", "gridcap.caption.captioner"]),
        ("train.decoders", "from .base import Decoder\nfrom ..loss import loss", []),
        ("train.decoders", "from .. import cli", ["gridcap.train.cli"]),
        ("train", "import extract.encoder as e", ["extract.encoder"]),
        ("train", "import recipes", ["recipes"]),
        ("common.config", "from common.config.section import Section\nfrom ..errors import ConfigError", []),
        ("common.config", "from train.loop import fit", ["gridcap.train.engine.loop", "gridcap.train.engine.loop.fit"]),
        ("common", "import extract", ["extract"]),
        ("common", "from demo.shapes import x", ["demo.shapes", "demo.shapes.x"]),
        ("caption", "import extract.encoder, train.search, common.files", []),
        ("caption", "from extract import cli", ["gridcap.extract.cli"]),
        ("caption", "from train.cli import main", ["gridcap.train.cli", "gridcap.train.cli.main"]),
        ("demo", "import extract.cli", ["gridcap.extract.cli"]),
        ("demo", "import train.loop", []),
    ],
)
def test_the_rule_itself(package: str, source: str, bad: list[str]) -> None:
    """A rule that finds nothing would pass for a clean house."""
    assert forbidden(source, package) == bad


# ----------------------------------------------------------------------------------------- without torch

HEAVY = ("torch", "torchvision")


def run_python(code: str, folder: Path) -> str:
    """Run code in a process of its own, in a folder without a pipeline.yaml, and give what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_of_common_loads_without_torch_and_without_the_other_packages(tmp_path: Path) -> None:
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "common").rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    assert {
        "common",
        "gridcap.common.store.reader",
        "common.config",
        "gridcap.common.config.load",
        "common.config.train",
    } <= set(names)
    code = f"import sys, {', '.join(names)}\nprint(*sys.modules)"
    loaded = run_python(code, tmp_path).split()
    assert set(names) <= set(loaded)
    assert not {*HEAVY, *(set(ALLOWED) - {"common"}), *OTHERS} & set(loaded)


def test_a_recipe_is_read_without_torch(tmp_path: Path) -> None:
    code = "import sys\nfrom common.config import load_config\nload_config(recipe='att2in')\nprint(*sys.modules)"
    loaded = set(run_python(code, tmp_path).split())
    assert "recipes" in loaded
    assert not {*HEAVY, "extract", "train", "caption", *OTHERS} & loaded


COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
del COMMANDS["gridcap"]  # the list of the others


def test_the_four_commands_are_installed() -> None:
    assert {"extract-features", "train-decoder", "evaluate-decoder", "caption-images"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once_without_loading_torch(command: str, tmp_path: Path) -> None:
    module, _, name = COMMANDS[command].partition(":")
    code = f"import sys\nfrom {module} import {name}\n{name}(['--help'], standalone_mode=False)\nprint(*sys.modules)"
    *text, loaded = run_python(code, tmp_path).splitlines()
    assert text[0].startswith("Usage:")
    assert any("Examples" in line for line in text)
    assert not set(HEAVY) & set(loaded.split())
