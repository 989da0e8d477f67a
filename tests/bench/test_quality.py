import json

import pytest
import yaml

from bench.quality import Folders, Quality, make_table
from bench.quality_runs import ABLATIONS, LARGER, RECIPES, SHORTER, plan_runs


def test_every_run_is_planned_once_and_after_its_source():
    runs = plan_runs(RECIPES, 3, True)
    names = [run.name for run in runs]
    recipes = 2 * len(RECIPES) + 2 * len(LARGER) + len(SHORTER)
    assert len(set(names)) == len(names) == 3 * recipes + 2 * len(ABLATIONS) + 1 + 3
    for position, run in enumerate(runs):
        assert run.source is None or runs.index(run.source) < position
        assert run.source is None or run.source.seed == run.seed


@pytest.fixture
def quality(tmp_path):
    return lambda: Quality(Folders(tmp_path, tmp_path, tmp_path / "runs", tmp_path / "results.json"), 1)


def scores(cider):
    metrics = {"CIDEr": cider, "BLEU-4": 0.1, "METEOR": 0.2, "ROUGE-L": 0.4, "perplexity": 20.0}
    return {"1": metrics, "3": metrics, "mbr": {**metrics, "CIDEr": cider + 0.02}}


def test_stored_scores_apply_only_to_the_same_arguments(quality, tmp_path):
    run = plan_runs(("att2in",), 1, False)[0]
    entry = {"row": run.row, "seed": 0, "arguments": [*run.arguments], "metrics": scores(0.4)}
    (tmp_path / "results.json").write_text(json.dumps({"runs": {run.name: entry}}))
    assert quality().is_done(run)
    del entry["metrics"]["mbr"]  # from before MBR was added
    (tmp_path / "results.json").write_text(json.dumps({"runs": {run.name: entry}}))
    assert quality().is_done(run), "its decoder no longer exists and would have to be trained again"
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"epochs": 1}}))
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert not quality().is_done(run), "its decoder exists and can be evaluated with MBR"
    assert [*quality().scores_of(run)] == ["1", "3"]
    entry["arguments"][-1] = "train.ema_decay=0.5"
    (tmp_path / "results.json").write_text(json.dumps({"runs": {run.name: entry}}))
    assert not quality().is_done(run)


def test_interrupted_run_does_not_count_as_trained(quality, tmp_path):
    run = plan_runs(("att2in",), 1, False)[0]
    folder = tmp_path / "runs" / run.name
    assert not quality()._is_trained(run)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"epochs": 2}}))
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert not quality()._is_trained(run)
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert quality()._is_trained(run)


def test_table_has_mean_and_standard_deviation_over_the_seeds(quality):
    results, runs = quality(), plan_runs(("att2in",), 2, False)
    for run, cider in zip(runs[:2], (0.40, 0.42), strict=True):
        results.scores[run.name] = {"arguments": [*run.arguments], "metrics": scores(cider)}
    lines = make_table(results, runs).splitlines()
    same = "10.0 ± 0.0 | 20.0 ± 0.0 | 40.0 ± 0.0 | 20.0 ± 0.0 |"
    assert lines[2:] == [f"| att2in | 2 | 41.0 ± 1.4 | 41.0 ± 1.4 | 43.0 ± 1.4 | {same}"]
    del results.scores[runs[1].name]["metrics"]["mbr"]  # from before MBR was added
    assert f"| 41.0 ± 1.4 | 42.0 (1) | {same}" in make_table(results, runs)
