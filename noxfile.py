"""Test sessions for all supported versions of Python and for the oldest supported dependencies.

``nox`` runs every session whose interpreter is installed, and names those that it skips. Arguments after ``--`` are
passed to pytest: ``nox -s tests-3.13 -- tests/common``.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OPTIONAL = "timm,heif,jxl,parquet,zstd,fast,tokenizers,languages"  # not web: gradio needs newer dependencies
TEST_PACKAGES = (
    *("pytest>=8", "hypothesis>=6.100", "setuptools>=77", "nbclient>=0.10", "ipykernel>=6.29"),
    *("keras>=3.5", "s3fs>=2024.6", "moto[s3]>=5", "flask-cors>=4"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
WITHOUT_CI = ENVIRONMENT | {"CI": ""}  # skips the tests whose optional packages are not installed

nox.options.error_on_missing_interpreters = False  # skip them, also if CI is set
nox.needs_version = ">=2024.3"


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests with the newest supported dependencies (constraints.txt)."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev]")
    session.run("pytest", *session.posargs, env=ENVIRONMENT)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """Run the tests with the oldest supported versions of the dependencies (the lower bounds in pyproject.toml)."""
    constraints = Path(session.create_tmp()) / "oldest.txt"
    constraints.write_text("\n".join(oldest_versions()) + "\n")
    session.install("--constraint", str(constraints), "--editable", f".[{OPTIONAL}]", *TEST_PACKAGES)
    session.run("pytest", *session.posargs, env=WITHOUT_CI)


def oldest_versions() -> list[str]:
    """Return the dependencies of the package, pinned to their lower bounds."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    return [re.sub(r">=([\d.]+)$", r"==\1.*", requirement) for requirement in project["dependencies"]]
