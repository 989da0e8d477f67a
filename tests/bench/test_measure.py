import json

import click
import pytest

from bench.measure import Row, call_in_process, describe_machine, rate, read_results, run_rounds, to_json


def test_variants_alternate():
    calls = []

    def variant(name):
        return lambda: calls.append(name) or len(calls)

    values = run_rounds(3, {"baseline": variant("baseline"), "gridcap": variant("gridcap")})
    assert calls == ["baseline", "gridcap"] * 3
    assert values == {"baseline": [1, 3, 5], "gridcap": [2, 4, 6]}


def test_ratios_are_computed_within_each_round():
    """A machine that is slow in the second round is slow for both variants."""
    row = Row("part", "x", "images/s", [40.0, 10.0, 44.0], [10.0, 2.0, 11.0], [80.0, 20.0, 80.0])
    assert row.results() == {"minimum": 40, "maximum": 40, "speedup": 4, "fraction of upper bound": 0.5}


@pytest.mark.parametrize(
    ("targets", "missed"),
    [
        ({}, []),
        ({"minimum": 40}, []),
        ({"minimum": 41}, ["minimum"]),
        ({"speedup": 4.0, "fraction of upper bound": 0.6}, ["fraction of upper bound"]),
        ({"maximum": 40}, []),
        ({"maximum": 39}, ["maximum"]),
    ],
)
def test_missed_targets_are_named(targets, missed):
    row = Row("part", "x", "images/s", [40.0], [10.0], [80.0], targets=targets)
    assert row.missed() == missed


def test_rate_is_items_per_second(monkeypatch):
    now = iter([0.0, 0.5, 1.0, 1.5, 2.0])
    monkeypatch.setattr("bench.measure.time.perf_counter", lambda: next(now))
    calls = []
    assert rate(8, lambda: calls.append(1), min_seconds=2.0) == 8 * 4 / 2
    assert len(calls) == 4


def test_call_in_process_returns_the_result_or_raises_with_stderr():
    assert call_in_process("math:gcd", 12, 18) == 6
    with pytest.raises(RuntimeError, match="math domain error"):
        call_in_process("math:sqrt", -1)


def test_results_file_round_trip(tmp_path):
    rows = [Row("part", "x", "s", [1.5, 2.5], baseline=[3.0, 4.0], targets={"maximum": 2.0}, note="n")]
    machine = describe_machine()
    (tmp_path / "x.json").write_text(json.dumps(to_json(machine, rows)))
    assert read_results(tmp_path / "x.json") == (machine, rows)
    assert machine["cores"] >= 1
    assert machine["versions"]["torch"]


def test_processors_without_x86_flags_are_described(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd\n")
    monkeypatch.setattr("bench.measure.CPUINFO", tmp_path / "cpuinfo")
    assert describe_machine()["instruction sets"] == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"machine": {}, "rows": [{"speed": 1}]}', "\0"])
def test_other_files_are_rejected(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(click.ClickException, match=r"x\.json is not a results file"):
        read_results(tmp_path / "x.json")
