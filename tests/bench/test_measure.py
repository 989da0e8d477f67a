import json

import click
import pytest

from bench.measure import Row, as_tree, fresh, machine, rate, read_rows, rounds


def test_sides_are_measured_in_turns():
    calls = []

    def side(name):
        return lambda: calls.append(name) or len(calls)

    values = rounds(3, {"baseline": side("baseline"), "ours": side("ours")})
    assert calls == ["baseline", "ours"] * 3
    assert values == {"baseline": [1, 3, 5], "ours": [2, 4, 6]}


def test_a_ratio_is_taken_within_each_round():
    """A machine that was slow in the second round was slow for both."""
    row = Row("part", "x", "images/s", [40.0, 10.0, 44.0], [10.0, 2.0, 11.0], [80.0, 20.0, 80.0])
    assert row.found() == {"value": 40, "at most": 40, "of baseline": 4, "of limit": 0.5}


@pytest.mark.parametrize(
    ("wanted", "missed"),
    [
        ({}, []),
        ({"value": 40}, []),
        ({"value": 41}, ["value"]),
        ({"of baseline": 4.0, "of limit": 0.6}, ["of limit"]),
        ({"at most": 40}, []),
        ({"at most": 39}, ["at most"]),
    ],
)
def test_a_bar_that_is_missed_is_named(wanted, missed):
    row = Row("part", "x", "images/s", [40.0], [10.0], [80.0], wanted=wanted)
    assert row.missed() == missed


def test_rate_counts_items_a_second(monkeypatch):
    now = iter([0.0, 0.5, 1.0, 1.5, 2.0])
    monkeypatch.setattr("bench.measure.time.perf_counter", lambda: next(now))
    calls = []
    assert rate(8, lambda: calls.append(1), least_seconds=2.0) == 8 * 4 / 2
    assert len(calls) == 4


def test_a_fresh_process_returns_what_the_function_does_and_tells_what_went_wrong():
    assert fresh("math:gcd", 12, 18) == 6
    with pytest.raises(RuntimeError, match="math domain error"):
        fresh("math:sqrt", -1)


def test_a_results_file_gives_back_what_was_written(tmp_path):
    rows = [Row("part", "x", "s", [1.5, 2.5], baseline=[3.0, 4.0], wanted={"at most": 2.0}, note="n")]
    where = machine()
    (tmp_path / "x.json").write_text(json.dumps(as_tree(where, rows)))
    assert read_rows(tmp_path / "x.json") == (where, rows)
    assert where["cores"] >= 1
    assert where["versions"]["torch"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"machine": {}, "rows": [{"speed": 1}]}', "\0"])
def test_a_file_that_is_no_results_file_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(click.ClickException, match=r"x\.json is no results file"):
        read_rows(tmp_path / "x.json")
