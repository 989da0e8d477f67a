"""README and docs: links have targets, and the explained messages exist in the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for name in ("common", "extract", "train", "caption") for path in sorted((ROOT / name).rglob("*.py"))]
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
