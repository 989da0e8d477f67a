import itertools
import sys

import pytest

from gridcap.common.progress import progress_bar


@pytest.mark.parametrize(("terminal", "drawn"), [(True, 10), (False, 2)])
def test_in_a_log_the_bar_is_drawn_seldom(terminal, drawn, monkeypatch, capsys):
    seconds = itertools.count()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar(total=8, miniters=1) as bar:
        bar._time = lambda: next(seconds)  # a second passes between any two looks at the clock
        bar.last_print_t = bar.start_t = next(seconds)
        for _ in range(8):
            bar.update(1)
    lines = capsys.readouterr().err.split("\r")
    assert "8/8" in lines[-1]
    assert len([line for line in lines if "/8" in line]) == drawn
