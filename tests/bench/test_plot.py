import json

import pytest
from click.testing import CliRunner
from PIL import Image

from bench.measure import Row, to_json
from bench.plot import MARKS, between_marks, format_cell, main, make_short_table, make_table

MACHINE = {
    "processor": "A Processor",
    "cores": 2,
    "memory (GiB)": 24,
    "instruction sets": ["avx2"],
    "gpu": None,
    "threads": 2,
    "system": "Linux",
    "python": "3.11.2",
    "versions": {"torch": "2.15.0"},
}
ROWS = [
    Row(
        "reading",
        "rows",
        "rows/s",
        [1000.0, 1200.0, 1100.0],
        [100.0, 100.0, 110.0],
        [2000.0] * 3,
        "h5py",
        "preadv",
        {"speedup": 5, "fraction of upper bound": 0.8},
    ),
    Row("starting", "help", "s", [0.5], note="whole process"),
]


def test_table_has_one_line_per_row_with_ratios_and_missed_targets():
    _, _, first, second = make_table(ROWS).splitlines()
    assert first == (
        "| rows | 1100 ± 100 rows/s | 100 ± 5 | 10 | 2000 ± 0 | 0.55 | speedup 5; 0.8 of the upper bound: **missed** |"
    )
    assert second == "| help | 0.5 s |  |  |  |  |  |"


def test_short_table_has_only_throughputs_with_a_baseline():
    _, _, line = make_short_table(ROWS).splitlines()
    assert line == "| rows | 1100 rows/s | 10 × (h5py) | 0.55 (preadv) |"


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([0.01234], "0.0123"), ([1.0, 3.0], "2 ± 1"), ([99_999.4], "99999")],
)
def test_cell_format(values, text):
    assert format_cell(values) == text


def test_only_the_text_between_the_marks_is_replaced():
    page = f"# Speed\n\ntext\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nmore text\n"
    once = between_marks(page, "new")
    assert once == page.replace("old", "new")
    assert between_marks(once, "new") == once
    with pytest.raises(ValueError, match="no <!-- bench"):
        between_marks("# Speed\n", "new")


def test_page_gets_machine_table_and_chart(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(to_json(MACHINE, ROWS)))
    page = tmp_path / "speed.md"
    page.write_text(f"{MARKS[0]}\n{MARKS[1]}\n")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Gridcap\n{MARKS[0]}\nold\n{MARKS[1]}\nmore\n")
    done = CliRunner().invoke(main, [str(tmp_path / "r.json"), "--page", str(page), "--readme", str(readme)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "A Processor, 2 cores" in text
    assert "| rows | 1100" in text
    assert "* rows: baseline: h5py; upper bound: preadv." in text
    assert "* help: whole process." in text
    assert "![ratios](speed.png)" in text
    assert readme.read_text().startswith("# Gridcap\n" + MARKS[0])
    assert "old" not in readme.read_text()
    assert "| rows | 1100 rows/s |" in readme.read_text()
    with Image.open(tmp_path / "speed.png") as chart:
        assert chart.width > 800


def test_missing_marks_leave_both_pages_unchanged(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(to_json(MACHINE, ROWS)))
    page, readme = tmp_path / "speed.md", tmp_path / "README.md"
    page.write_text(f"{MARKS[0]}\n{MARKS[1]}\n")
    readme.write_text("# Gridcap\n")
    done = CliRunner().invoke(main, [str(tmp_path / "r.json"), "--page", str(page), "--readme", str(readme)])
    assert done.exit_code == 1
    assert f"{readme}: no <!-- bench: begin -->" in done.output
    assert page.read_text() == f"{MARKS[0]}\n{MARKS[1]}\n"
