import json
import types

import pytest
from click.testing import CliRunner

import bench.__main__
from bench.__main__ import PARTS, main, results_name
from bench.measure import Row


@pytest.fixture
def parts(monkeypatch):
    """Replace the benchmarks by fake ones and return the recorded calls."""
    calls = []

    def load(name):
        def measure(work, quick):
            assert work.is_dir()
            calls.append((name, quick))
            yield Row(name.partition(".")[2], f"{name} {len(calls)}", "s", [1.0], targets={"maximum": 0.5})

        return types.SimpleNamespace(measure=measure)

    monkeypatch.setattr(bench.__main__, "importlib", types.SimpleNamespace(import_module=load))
    return calls


def invoke(*arguments):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def names(path):
    return [row["name"] for row in json.loads(path.read_text())["rows"]]


def test_all_benchmarks_are_run_and_stored(parts, tmp_path):
    output = invoke("--quick", "--output", tmp_path / "r.json")
    assert parts == [(f"bench.{name}", True) for name in PARTS]
    assert names(tmp_path / "r.json") == [f"bench.{name} {i + 1}" for i, name in enumerate(PARTS)]
    assert "missed targets: bench.extraction 1 (maximum)" in output


def test_rerunning_one_benchmark_keeps_the_others(parts, tmp_path):
    invoke("--output", tmp_path / "r.json")
    invoke("--only", "reading", "--output", tmp_path / "r.json")
    expected = [f"bench.{name} {i + 1}" for i, name in enumerate(PARTS)]
    expected[PARTS.index("reading")] = f"bench.reading {len(PARTS) + 1}"
    assert names(tmp_path / "r.json") == expected


def test_interrupted_run_keeps_new_and_earlier_results(monkeypatch, tmp_path):
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
    assert {row["name"]: row["values"] for row in json.loads(path.read_text())["rows"]} == {"one": [3.0], "two": [2.0]}


def test_obsolete_rows_are_removed_when_their_benchmark_is_rerun(parts, tmp_path):
    invoke("--only", "reading", "--output", tmp_path / "r.json")
    invoke("--only", "reading", "--output", tmp_path / "r.json")
    assert names(tmp_path / "r.json") == ["bench.reading 2"]


def test_results_file_is_named_by_the_machine():
    machine = {"gpu": None, "processor": "Intel(R) Xeon(R) Processor @ 2.50GHz", "cores": 2}
    assert results_name(machine) == "intel-xeon-processor-2.50ghz-2-cores.json"
    assert results_name({**machine, "gpu": "NVIDIA H200"}) == "nvidia-h200-2-cores.json"
