"""Imports go one way and without cycles, and everything that does not need torch loads without it."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {  # subpackage of gridcap -> the subpackages that it may import
    "common": set(),
    "extract": {"common"},
    "train": {"common"},
    "caption": {"extract", "train", "common"},
    "recipes": set(),  # YAML files, read by gridcap.common.config
}
TOOLS = {"bench", "demo", "tests"}  # import gridcap, and gridcap imports none of them
HEAVY = ("torch", "torchvision", "matplotlib", "tensorboard", "pycocoevalcap", "gradio")


@functools.cache
def source_files() -> dict[str, Path]:
    """Return module name -> file of every module of gridcap and of the tools except the tests."""
    files = {f"gridcap.{path.stem}": path for path in (ROOT / "gridcap").glob("*.py")}
    for folder in (*ALLOWED, "bench", "demo", "tests/torture"):
        prefix = "gridcap." if folder in ALLOWED else ""
        for path in sorted((ROOT / folder).rglob("*.py")):
            files[prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imported_names(tree: ast.AST, package: str) -> set[str]:
    """Return the absolute names of everything that a syntax tree imports, at any depth.

    ``from a import b`` yields both "a" and "a.b", since b may be a module.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parent = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{parent}.{base}".rstrip(".")
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def is_cli(name: str) -> bool:
    return any(part == "cli" or part.endswith("_cli") for part in name.split("."))


def forbidden_imports(source: str, module: str, package: str) -> list[str]:
    """Return the imports of a module (dotted names) that the design does not allow."""
    top, _, subpackage = ".".join(module.split(".")[:2]).partition(".")
    inside = top == "gridcap"
    may_import = {subpackage, *ALLOWED[subpackage]} if inside and subpackage in ALLOWED else {*ALLOWED} - {"recipes"}
    forbidden = []
    for name in imported_names(ast.parse(source), package):
        first, *rest = name.split(".")
        if first == "gridcap":
            wrong_layer = rest and rest[0] in ALLOWED and rest[0] not in may_import
            if wrong_layer or (is_cli(name) and top != "tests"):  # tests invoke commands
                forbidden.append(name)
        elif first in ALLOWED or (inside and first in TOOLS):  # `import common` works only in the repository
            forbidden.append(name)
    return sorted(forbidden)


def package_of(module: str) -> str:
    return module if source_files()[module].name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize("module", source_files())
def test_a_module_imports_only_what_the_design_allows(module: str) -> None:
    source = source_files()[module].read_text(encoding="utf-8")
    assert forbidden_imports(source, module, package_of(module)) == []


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("gridcap.extract.x", "import numpy, gridcap.common.store\nfrom gridcap.common import config", []),
        ("gridcap.extract.x", "from gridcap.train.loop import f", ["gridcap.train.loop", "gridcap.train.loop.f"]),
        ("gridcap.extract.x", "def f():\n    import gridcap.train", ["gridcap.train"]),
        ("gridcap.extract.x", "if TYPE_CHECKING:\n    from gridcap import caption", ["gridcap.caption"]),
        ("gridcap.train.decoders.x", "from .base import Decoder\nfrom ..loss import loss", []),
        ("gridcap.train.decoders.x", "from .. import cli", ["gridcap.train.cli"]),
        ("gridcap.train.x", "import common.errors", ["common.errors"]),
        ("gridcap.train.x", "import gridcap.recipes", ["gridcap.recipes"]),
        ("gridcap.common.config.x", "from ..errors import ConfigError\nimport gridcap", []),
        ("gridcap.common.config.x", "from gridcap.extract import a", ["gridcap.extract", "gridcap.extract.a"]),
        ("gridcap.common.x", "from demo.shapes import x", ["demo.shapes", "demo.shapes.x"]),
        ("gridcap.caption.x", "import gridcap.extract.images, gridcap.train.decoding, gridcap.common.files", []),
        ("gridcap.caption.x", "from gridcap.extract import cli", ["gridcap.extract.cli"]),
        ("gridcap.caption.x", "import gridcap.train.evaluate_cli", ["gridcap.train.evaluate_cli"]),
        ("gridcap.x", "import gridcap.train.cli", ["gridcap.train.cli"]),
        ("gridcap.x", "import gridcap.train.engine, gridcap.caption", []),
        ("demo.x", "import gridcap.extract.cli", ["gridcap.extract.cli"]),
        ("demo.x", "import gridcap.train.engine.loop", []),
    ],
)
def test_forbidden_imports_detects_violations(module: str, source: str, forbidden: list[str]) -> None:
    assert forbidden_imports(source, module, module.rpartition(".")[0]) == forbidden


# ------------------------------------------------------------------------------------------- import cycles


def runtime_imports(node: ast.AST) -> list[ast.stmt]:
    """Return the import statements that run on import: not those of functions and ``if TYPE_CHECKING`` blocks."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [node]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return []
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return []
    return [statement for child in ast.iter_child_nodes(node) for statement in runtime_imports(child)]


def import_graph() -> dict[str, set[str]]:
    """Return module -> the modules of ours that it imports when it is loaded."""
    files = source_files()
    graph = {}
    for module, path in files.items():
        tree = ast.Module(runtime_imports(ast.parse(path.read_text(encoding="utf-8"))), [])
        graph[module] = {name for name in imported_names(tree, package_of(module)) if name in files} - {module}
        submodules = {name for name in graph[module] if name.startswith(f"{module}.")}
        for name in [*graph[module] - submodules]:  # `from package import module` depends on the module only
            if files[name].name == "__init__.py" and any(other.startswith(f"{name}.") for other in graph[module]):
                graph[module].discard(name)
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle, or an empty list."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for successor in sorted(graph.get(node, ())):
            if cycle := visit(successor):
                return cycle
        path.pop()
        done.add(node)
        return []

    for start in sorted(graph):
        if cycle := visit(start):
            return cycle
    return []


def test_no_import_cycles() -> None:
    graph = import_graph()
    assert "gridcap.common.errors" in graph["gridcap.common.command.command"]
    assert find_cycle(graph) == []


def test_find_cycle_detects_cycles() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# ------------------------------------------------------------------------------------------------ packages


def test_every_top_level_package_is_covered() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {*ALLOWED, *TOOLS, "gridcap"}


def test_gridcap_links_to_every_subpackage() -> None:
    links = {path.name: path.resolve() for path in (ROOT / "gridcap").iterdir() if path.is_symlink()}
    assert links == {name: ROOT / name for name in ALLOWED}


def test_every_folder_with_code_is_a_package_and_data_files_are_packaged() -> None:
    files = [p for name in ALLOWED for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    folders = {path.parent for path in files if path.suffix == ".py"}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    patterns = [
        (ROOT / package.removeprefix("gridcap.").replace(".", "/"), p) for package in data for p in data[package]
    ]
    packaged = {path for folder, pattern in patterns for path in folder.glob(pattern)}
    assert [path for path in files if path.suffix != ".py" and path not in packaged] == []


def test_recipes_contain_no_code() -> None:
    files = {path.name for path in (ROOT / "recipes").iterdir() if path.name != "__pycache__"}
    assert {name for name in files if not name.endswith(".yaml")} == {"__init__.py"}
    (statement,) = ast.parse((ROOT / "recipes" / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant), "a docstring"


# ------------------------------------------------------------------------------------------- without torch


def run_python(code: str, folder: Path) -> str:
    """Run code in a new process in a folder without a pipeline.yaml, and return its standard output."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_modules(loaded: set[str]) -> set[str]:
    """Return those of the loaded modules that are slow to import or belong to other layers."""
    tops = {name.split(".")[0] for name in loaded}
    layers = {name.split(".")[1] for name in loaded if name.startswith("gridcap.")}
    return {*HEAVY} & tops | TOOLS & tops | {"extract", "train", "caption"} & layers


def test_common_loads_without_torch_and_without_the_other_layers(tmp_path: Path) -> None:
    torch_view = "gridcap.common.store.dataset"  # imported only by FeatureStore.as_dataset
    names = [name for name in source_files() if name.startswith("gridcap.common") and name != torch_view]
    assert len(names) > 20
    code = f"import sys, {', '.join(names)}\nprint(*sys.modules)"
    loaded = set(run_python(code, tmp_path).split())
    assert set(names) <= loaded
    assert heavy_modules(loaded) == set()


def test_a_recipe_is_read_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom gridcap.common.config import load_config\nload_config(recipe='att2in')\nprint(*sys.modules)"
    )
    loaded = set(run_python(code, tmp_path).split())
    assert "gridcap.recipes" in loaded
    assert heavy_modules(loaded) == set()


def test_the_package_loads_without_torch(tmp_path: Path) -> None:
    loaded = set(run_python("import sys, gridcap\ndir(gridcap)\nprint(*sys.modules)", tmp_path).split())
    assert heavy_modules(loaded) == set()


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def test_entry_points() -> None:
    assert list(SCRIPTS) == ["gridcap", "extract-features", "train-decoder", "evaluate-decoder", "caption-images"]


HELP_OF_ALL = """
import contextlib, importlib, io, json, sys
from gridcap.cli import COMMANDS, main

def show(command, arguments):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        command(arguments, standalone_mode=False)
    heavy = sorted({name.split(".")[0] for name in sys.modules} & set(%r))
    return {"help": text.getvalue(), "heavy": heavy}

shown = {name: show(main, [name, "--help"]) for name in COMMANDS}
for target in %r:
    module, _, name = target.partition(":")
    shown[target] = show(getattr(importlib.import_module(module), name), ["--help"])
print(json.dumps(shown))
"""


def test_every_help_answers_without_loading_torch(tmp_path: Path) -> None:
    shown = json.loads(run_python(HELP_OF_ALL % (HEAVY, list(SCRIPTS.values())), tmp_path))
    assert len(shown) > len(SCRIPTS) + 8
    for command, result in shown.items():
        assert result["help"].startswith("Usage:"), command
        assert result["heavy"] == [], command
