"""README and docs: links lead somewhere, and the messages that are explained are still said."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for name in ("common", "extract", "train", "caption") for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    inside = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in inside if not (page.parent / link).exists()] == []
    assert all(link.startswith("https://") for link in links if link not in inside)


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", PAGES[0].read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


def test_messages_that_are_explained_are_still_said():
    """The first column of the tables, but for what stands for something else there: N, numbers, `...`, names."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    said = re.sub(r'"\s*\n?\s*f?"', "", source)  # literals that are one text
    said += (ROOT / "common" / "report" / "report.html").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    for message in (text for row in rows for text in re.findall(r"`([^`]+)`", row)):
        parts = re.split(r"\.\.\.|\b[NM]\b|\d+%?|\ba\.jpg\b|\bb\.jpg\b|\bb?float\d*\b|\bMETEOR\b|\bSPICE\b", message)
        for part in (part.strip(" ,%") for part in parts):
            assert len(part) < 4 or part in said, f"{message!r}: nobody says {part!r} any more"
