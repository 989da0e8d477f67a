"""Progress bars."""

import itertools
import sys

import pytest

from gridcap.common.progress import progress_bar


@pytest.mark.parametrize(("is_terminal", "updates"), [(True, 10), (False, 2)])
def test_the_bar_is_updated_rarely_in_a_log(is_terminal, updates, monkeypatch, capsys):
    seconds = itertools.count()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with progress_bar(total=8, miniters=1) as bar:
        bar._time = lambda: next(seconds)  # every call of the clock is one second later
        bar.last_print_t = bar.start_t = next(seconds)
        for _ in range(8):
            bar.update(1)
    lines = capsys.readouterr().err.split("\r")
    assert "8/8" in lines[-1]
    assert len([line for line in lines if "/8" in line]) == updates
