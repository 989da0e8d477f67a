import json
import types

import pytest
from click.testing import CliRunner

import bench.__main__
from bench.__main__ import PARTS, file_name, main
from bench.measure import Row


@pytest.fixture
def parts(monkeypatch):
    """Parts that take no time; gives what they were called with."""
    calls = []

    def load(name):
        def measure(work, quick):
            assert work.is_dir()
            calls.append((name, quick))
            yield Row(name.partition(".")[2], f"{name} {len(calls)}", "s", [1.0], wanted={"at most": 0.5})

        return types.SimpleNamespace(measure=measure)

    monkeypatch.setattr(bench.__main__, "importlib", types.SimpleNamespace(import_module=load))
    return calls


def invoke(*arguments):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def names(path):
    return [row["name"] for row in json.loads(path.read_text())["rows"]]


def test_all_parts_are_measured_and_kept(parts, tmp_path):
    output = invoke("--quick", "--output", tmp_path / "r.json")
    assert parts == [(f"bench.{name}", True) for name in PARTS]
    assert names(tmp_path / "r.json") == [f"bench.{name} {i + 1}" for i, name in enumerate(PARTS)]
    assert "below what is wanted: bench.extraction 1 (at most)" in output


def test_one_part_measured_again_leaves_the_others_alone(parts, tmp_path):
    invoke("--output", tmp_path / "r.json")
    invoke("--only", "reading", "--output", tmp_path / "r.json")
    expected = [f"bench.{name} {i + 1}" for i, name in enumerate(PARTS)]
    expected[PARTS.index("reading")] = f"bench.reading {len(PARTS) + 1}"
    assert names(tmp_path / "r.json") == expected


def test_a_run_that_is_stopped_leaves_what_it_has_measured_and_the_rest_of_an_earlier_one(monkeypatch, tmp_path):
    values = iter((1.0, 2.0, 3.0))

    def measure(work, quick):
        yield Row("reading", "one", "s", [next(values)])
        yield Row("reading", "two", "s", [next(values)])

    load = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(measure=measure))
    monkeypatch.setattr(bench.__main__, "importlib", load)
    path = tmp_path / "r.json"
    invoke("--only", "reading", "--output", path)
    done = CliRunner().invoke(main, ["--only", "reading", "--output", str(path)])
    assert done.exit_code != 0
    assert {row["name"]: row["ours"] for row in json.loads(path.read_text())["rows"]} == {"one": [3.0], "two": [2.0]}


def test_a_row_that_is_measured_no_more_goes_when_its_part_is_measured_again(parts, tmp_path):
    invoke("--only", "reading", "--output", tmp_path / "r.json")
    invoke("--only", "reading", "--output", tmp_path / "r.json")
    assert names(tmp_path / "r.json") == ["bench.reading 2"]


def test_results_are_named_by_the_machine():
    where = {"gpu": None, "processor": "Intel(R) Xeon(R) Processor @ 2.50GHz", "cores": 2}
    assert file_name(where) == "intel-xeon-processor-2.50ghz-2-cores.json"
    assert file_name({**where, "gpu": "NVIDIA H200"}) == "nvidia-h200-2-cores.json"
