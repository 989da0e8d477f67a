import json

import pytest
import yaml

from bench.quality import INGREDIENTS, LARGER, RECIPES, SHORTER, Quality, plan, table


def test_every_recipe_and_seed_once_and_what_goes_on_from_them_after_them():
    runs = plan(RECIPES, 3, True)
    names = [run.name for run in runs]
    recipes = 2 * len(RECIPES) + 2 * len(LARGER) + len(SHORTER)
    assert len(set(names)) == len(names) == 3 * recipes + 2 * len(INGREDIENTS) + 1 + 3
    for place, run in enumerate(runs):
        assert run.source is None or runs.index(run.source) < place
        assert run.source is None or run.source.seed == run.seed


@pytest.fixture
def quality(tmp_path):
    return lambda: Quality(tmp_path, tmp_path, tmp_path / "runs", tmp_path / "results.json", 1)


def scores(cider):
    metrics = {"CIDEr": cider, "BLEU-4": 0.1, "METEOR": 0.2, "ROUGE-L": 0.4, "perplexity": 20.0}
    return {"1": metrics, "3": metrics, "consensus": {**metrics, "CIDEr": cider + 0.02}}


def test_a_run_stands_only_with_the_same_arguments(quality, tmp_path):
    run = plan(("att2in",), 1, False)[0]
    entry = {"row": run.row, "seed": 0, "arguments": [*run.arguments], "beam": scores(0.4)}
    (tmp_path / "results.json").write_text(json.dumps({"runs": {run.name: entry}}))
    assert quality().is_done(run)
    del entry["beam"]["consensus"]  # of before there was one
    (tmp_path / "results.json").write_text(json.dumps({"runs": {run.name: entry}}))
    assert quality().is_done(run), "it would have to be trained anew"
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"epochs": 1}}))
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert not quality().is_done(run), "it is there, to be captioned by the new search"
    assert [*quality().found(run)] == ["1", "3"]
    entry["arguments"][-1] = "train.ema_decay=0.5"
    (tmp_path / "results.json").write_text(json.dumps({"runs": {run.name: entry}}))
    assert not quality().is_done(run)


def test_a_run_that_was_stopped_is_not_taken_for_a_trained_one(quality, tmp_path):
    run = plan(("att2in",), 1, False)[0]
    folder = tmp_path / "runs" / run.name
    assert not quality()._is_trained(run)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"epochs": 2}}))
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert not quality()._is_trained(run)
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert quality()._is_trained(run)


def test_the_table_gives_mean_and_spread_of_the_seeds(quality):
    found, runs = quality(), plan(("att2in",), 2, False)
    for run, cider in zip(runs[:2], (0.40, 0.42), strict=True):
        found.scores[run.name] = {"arguments": [*run.arguments], "beam": scores(cider)}
    lines = table(found, runs).splitlines()
    same = "10.0 ± 0.0 | 20.0 ± 0.0 | 40.0 ± 0.0 | 20.0 ± 0.0 |"
    assert lines[2:] == [f"| att2in | 2 | 41.0 ± 1.4 | 41.0 ± 1.4 | 43.0 ± 1.4 | {same}"]
    del found.scores[runs[1].name]["beam"]["consensus"]  # of before there was one
    assert f"| 41.0 ± 1.4 | 42.0 (1) | {same}" in table(found, runs)
