"""The wheel: one name in site-packages, and no collision with the user's modules."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import gridcap

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = ("gridcap", "common", "extract", "train", "caption", "recipes")
FILES = ("pyproject.toml", "README.md", "LICENSE")
API = "Captioner, FeatureStore, GridEncoder, extract_features, train_decoder"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution from a copy of the repository and unpack it."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs pip and setuptools: pip install pip setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "repository"
    copy.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    archive = copy / run(sys.executable, "-c", code, cwd=copy).splitlines()[-1]
    with tarfile.open(archive) as file:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python 3.10.11 and 3.11.3
        file.extractall(folder, **safely)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Build the wheel from the source distribution."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=sdist)
    (path,) = (sdist / "dist").glob("*.whl")
    return path


def test_the_wheel_contains_exactly_the_files_of_the_repository(wheel: Path) -> None:
    expected = {
        f"{folder}{path.relative_to(ROOT)}"
        for folder, names in (("", ("gridcap",)), ("gridcap/", SOURCES[1:]))
        for name in names
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.is_symlink()
    }
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == expected


def test_the_wheel_includes_license_and_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.10" in text


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Install the wheel into a new environment that shares our dependencies; return its Python and the added names."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    before = {path.name for path in site_packages.iterdir()}
    install = ("install", "--no-deps", "--no-index", "--no-compile", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=folder)
    added = {path.name for path in site_packages.iterdir()} - before
    # Afterwards, since pip installs nothing if these dependencies include gridcap.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, added


def test_the_wheel_adds_one_name_to_site_packages(environment: tuple[Path, set[str]]) -> None:
    assert environment[1] == {"gridcap", f"gridcap-{PROJECT['version']}.dist-info"}


def test_the_wheel_works_in_a_folder_with_modules_of_the_same_names(
    environment: tuple[Path, set[str]], tmp_path: Path
) -> None:
    python, _ = environment
    for name in ("train.py", "common.py", "caption.py", "recipes.py"):
        (tmp_path / name).write_text("raise ImportError('the module of the user was imported')\n")
    (tmp_path / "extract").mkdir()
    (tmp_path / "extract" / "__init__.py").write_text("raise ImportError('the package of the user was imported')\n")
    code = f"import gridcap; from gridcap import {API}; print(gridcap.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).strip()).is_relative_to(python.parents[1])
    assert run(python.parent / "gridcap", "--help", cwd=tmp_path).startswith("Usage: gridcap ")
    assert "top-down" in run(python.parent / "gridcap", "recipes", cwd=tmp_path)
    for command in PROJECT["scripts"]:
        assert f"Usage: {command} " in run(python.parent / command, "--help", cwd=tmp_path)


def test_citation_and_package_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"] == gridcap.__version__
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
