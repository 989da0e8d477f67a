"""README and docs: links, flags, messages, and the table of faults match the code."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gridcap.cli import main as gridcap
from tests.torture.worker import PARTS, load_part

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for name in ("common", "extract", "train", "caption") for path in sorted((ROOT / name).rglob("*.py"))]
PROGRAMS = ("bench.__main__", "bench.plot", "bench.quality", "bench.scale", "demo.__main__", "tests.torture.__main__")
OTHER_PROGRAMS = ("torchrun", "srun", "sbatch", "#SBATCH", "mypy")  # lines with flags of other programs
OTHER_FLAGS = {
    "--array",
    "--requeue",
    "--signal",
    "--node-rank",
    "--rdzv-backend",
}  # of sbatch and torchrun, mentioned alone
PLACEHOLDERS = r"\.\.\.|\b[NM]\b|\d+%?|\ba\.jpg\b|\bb\.jpg\b|\bb?float\d*\b|\bMETEOR\b|\bSPICE\b"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_relative_links_have_targets_and_others_use_https(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    relative = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in relative if not (page.parent / link).exists()] == []
    assert all(link.startswith("https://") for link in links if link not in relative)


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", PAGES[0].read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


def test_explained_messages_exist_in_the_code():
    """Check the first column of the tables in troubleshooting.md, between its placeholders."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    messages = re.sub(r'"\s*\n?\s*f?"', "", source)  # join adjacent string literals
    messages += (ROOT / "common" / "report" / "report.html").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    explained = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    parts = [part.strip(" ,%") for text in explained for part in re.split(PLACEHOLDERS, text)]
    assert [part for part in parts if len(part) >= 4 and part not in messages] == []


def _flags(command: click.Command) -> Iterator[str]:
    """Yield all flags of a command and its subcommands."""
    for parameter in command.get_params(click.Context(command)):
        yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from _flags(subcommand)


def test_flags_in_the_docs_exist():
    known = OTHER_FLAGS | set(_flags(gridcap))
    for name in PROGRAMS:
        known |= set(_flags(importlib.import_module(name).main))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "pipeline.yaml"]:
        for line in page.read_text(encoding="utf-8").replace("\\\n", "").splitlines():
            if not any(program in line for program in OTHER_PROGRAMS):
                unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)) - known
                assert not unknown, f"{page.name}: {unknown}"


def test_table_of_faults_matches_the_torture_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("| fault | `--only` |")[2]
    rows = [line.split("|")[2:4] for line in text.split("\n\n")[0].splitlines()[2:]]
    table = {name.strip(): int(cases.replace(" ", "")) for name, cases in rows}
    assert table == {name: load_part(name).cases for name in PARTS}
