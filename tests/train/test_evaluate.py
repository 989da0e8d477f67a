import csv
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from click.testing import CliRunner

from gridcap.common.captions.records import ImageRecord
from gridcap.common.config import CaptionConfig
from gridcap.common.errors import MismatchError
from gridcap.train.decoding.beam import BeamOptions, beam_search
from gridcap.train.engine.checkpoint import load_checkpoint
from gridcap.train.engine.loop import fit
from gridcap.train.evaluate import EvaluationOptions, evaluate
from gridcap.train.evaluate_cli import evaluate_decoder
from gridcap.train.evaluation import Evaluation, write_evaluation
from gridcap.train.metrics.coco import Scores
from gridcap.train.metrics.statistics import caption_statistics

BEAM = CaptionConfig(beam_size=3, max_length=6, batch_size=4, length_penalty=0.7)
QUIET = EvaluationOptions("cpu", progress=False)

pytestmark = pytest.mark.usefixtures("no_java")


@pytest.fixture(scope="module")
def run(tmp_path_factory, new_data, new_config):
    """A short run, and other images to evaluate it on: one is invalid, the others have one to three references."""
    folder = tmp_path_factory.mktemp("evaluate")
    fit(new_config(folder / "run", epochs=3), new_data(folder / "train.h5"), None, False, progress=False)
    test = new_data(folder / "test.h5", 11, first_id=700, seed=2, invalid_reasons={4: "truncated"})
    return load_checkpoint(folder / "run"), test


@pytest.fixture
def evaluation(run):
    return evaluate(*run, BEAM, QUIET)


def grid_of(data, position):
    return torch.from_numpy(data.store[int(data.rows[position])]).float().reshape(1, 4, 8)


def manual_perplexity(checkpoint, data):
    losses = []
    for position, captions in enumerate(data.captions):
        memory = checkpoint.decoder.encode(grid_of(data, position))
        for text in captions:
            tokens = torch.tensor(checkpoint.vocabulary.encode(text, 8))
            with torch.no_grad():
                logits = checkpoint.decoder(memory, tokens[None, None, :-1])[0][0, 0]
            losses += F.cross_entropy(logits, tokens[1:], reduction="none").tolist()
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_exp_of_the_mean_loss_over_all_reference_tokens(run, evaluation):
    assert evaluation.scores.values["perplexity"] == pytest.approx(manual_perplexity(*run), rel=1e-5)


def test_captions_equal_beam_search_on_single_images(run, evaluation):
    checkpoint, data = run
    for position, row in enumerate(data.rows):
        (hypothesis,) = beam_search(checkpoint.decoder, grid_of(data, position), BeamOptions(3, 6, 0.7))
        assert evaluation.captions[int(data.store.image_id[row])] == checkpoint.vocabulary.decode(hypothesis.tokens)


def test_every_valid_image_has_caption_name_and_references(run, evaluation):
    _, data = run
    ids = [700 + i for i in range(11) if i != 4]
    assert list(evaluation.captions) == list(evaluation.file_names) == list(evaluation.references) == ids
    assert evaluation.file_names == {i: f"{i}.jpg" for i in ids}
    assert list(evaluation.references.values()) == data.captions


def test_results_do_not_depend_on_batch_size(run, evaluation):
    other = evaluate(*run, BEAM.model_copy(update={"batch_size": 50}), QUIET)
    assert other.captions == evaluation.captions
    assert other.scores.values == pytest.approx(evaluation.scores.values, rel=1e-5)


def test_max_length_limits_captions(run):
    short = evaluate(*run, BEAM.model_copy(update={"max_length": 2}), QUIET)
    assert max(len(text.split()) for text in short.captions.values()) <= 2


def test_mismatched_provenance_raises_with_the_difference(run, tmp_path, new_data):
    other = new_data(tmp_path / "other.h5", 6, layer="Mixed_6e")
    with pytest.raises(MismatchError, match=r"Mixed_7c.*Mixed_6e"):
        evaluate(run[0], other, BEAM, QUIET)


def test_written_files_contain_metrics_captions_and_coco_results(run, evaluation, tmp_path):
    path = tmp_path / "new" / "test.json"
    written = write_evaluation(evaluation, path, {"seed": 0})
    tree = json.loads(path.read_text())
    assert tree["settings"] == {"seed": 0}
    keys = {"settings", "metrics", "intervals", "bootstrap", "statistics", "tokenizer", "unavailable", "captions"}
    assert set(tree) == keys
    assert set(tree["intervals"]) == set(tree["metrics"])
    assert tree["metrics"] == evaluation.scores.values
    assert next(iter(tree["metrics"])) == "perplexity"
    assert tree["statistics"] == evaluation.statistics
    assert set(tree["unavailable"]) == {"METEOR", "SPICE", "novel_captions"}
    assert tree["captions"][0] == {
        "image_id": 700,
        "file_name": "700.jpg",
        "caption": evaluation.captions[700],
        "references": list(evaluation.references[700]),
    }
    assert len(tree["captions"]) == 10
    assert written == [tmp_path / "new" / f"test.{end}" for end in ("json", "scores.csv", "coco-results.json")]
    assert sorted(path.parent.iterdir()) == sorted(written), "no temporary file is left"
    expected = [{"image_id": i, "caption": text} for i, text in evaluation.captions.items()]
    assert json.loads(written[2].read_text()) == expected


def test_scores_csv_contains_every_caption_and_score(evaluation, tmp_path):
    _, table, _ = write_evaluation(evaluation, tmp_path / "test.json", {"seed": 0})
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "CIDEr-D"]
    assert list(rows[0]) == ["image_id", "file_name", "caption", *metrics]
    assert [int(row["image_id"]) for row in rows] == list(evaluation.captions)
    for row in rows:
        image = int(row["image_id"])
        assert (row["file_name"], row["caption"]) == (f"{image}.jpg", evaluation.captions[image])
        assert {name: float(row[name]) for name in metrics} == pytest.approx(
            evaluation.scores.per_image[image], abs=1e-6
        )


def test_scores_csv_quotes_commas_and_non_ascii_text():
    scores = Scores({"A": 0.5}, {1: {"A": 0.5}, 2: {}}, "")
    names, captions = {1: 'a, "b".jpg', 2: "ñ.jpg"}, {1: "x, y", 2: "犬"}
    text = Evaluation(captions, names, {1: ("r",), 2: ("r",)}, scores, {}).as_csv()
    assert list(csv.reader(text.splitlines())) == [
        ["image_id", "file_name", "caption", "A"],
        ["1", 'a, "b".jpg', "x, y", "0.500000"],
        ["2", "ñ.jpg", "犬", ""],
    ]


def test_pycocotools_loads_the_coco_results(run, evaluation, tmp_path, coco_file):
    from pycocotools.coco import COCO

    records = [ImageRecord(i, name, evaluation.references[i]) for i, name in evaluation.file_names.items()]
    truth = COCO(str(coco_file(tmp_path / "truth.json", records)))
    *_, results = write_evaluation(evaluation, tmp_path / "test.json", {"seed": 0})
    loaded = truth.loadRes(str(results))
    assert {loaded.anns[a]["image_id"]: loaded.anns[a]["caption"] for a in loaded.anns} == evaluation.captions
    assert sorted(loaded.getImgIds()) == list(evaluation.captions)


def test_sampled_captions_depend_only_on_the_seed(run):
    sampling = CaptionConfig(decoding="sample", max_length=6, batch_size=4, temperature=3.0)
    first, again, other = (evaluate(*run, sampling, replace(QUIET, seed=s)).captions for s in (1, 1, 2))
    assert first == again != other


def test_caption_statistics_equal_manual_counts():
    captions = {1: "a red dog", 2: "a cat", 3: "a red dog", 4: ""}
    references = {1: ("A dog.", "a dog that sits"), 2: ("cat",), 3: ("x",), 4: ("a b c",)}
    statistics = caption_statistics(captions, references, 50, ["A red dog!", "a cat sits"])
    assert statistics == {
        "distinct_words": 4,
        "vocabulary_words": 50,
        "distinct_captions": 3 / 4,
        "novel_captions": 2 / 4,
        "mean_length": 8 / 4,
        "mean_reference_length": 11 / 5,
    }
    assert "novel_captions" not in caption_statistics(captions, references, 50, None)


def test_evaluation_includes_caption_statistics(run, evaluation):
    checkpoint, _ = run
    training = list(evaluation.captions.values())[:1]
    result = evaluate(*run, BEAM, replace(QUIET, training_captions=training))
    assert "novel_captions" not in result.scores.unavailable
    words = len(checkpoint.vocabulary) - 4
    assert result.statistics == caption_statistics(evaluation.captions, evaluation.references, words, training)
    assert result.statistics["novel_captions"] < 1
    assert "trained on" in evaluation.scores.unavailable["novel_captions"]


def test_infinite_perplexity_is_written_as_valid_json(run, tmp_path):
    checkpoint, data = load_checkpoint(run[0].path), run[1]
    with torch.no_grad():
        checkpoint.decoder.output.weight *= 1e4
    result = evaluate(checkpoint, data, BEAM, QUIET)
    write_evaluation(result, tmp_path / "e.json", {"seed": 0})

    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "e.json").read_text(), parse_constant=reject)


# --- the command ---


@pytest.fixture(scope="module")
def template(tmp_path_factory, new_data, new_config):
    """Two runs whose configuration names their training captions, and a store to evaluate them on."""
    folder = tmp_path_factory.mktemp("command")
    train = new_data(folder / "train.h5")
    for name, seed in (("a", 0), ("b", 1)):
        config = new_config(folder / name, seed=seed, features=folder / "train.h5", annotations=folder / "train.json")
        fit(config, train, None, False, progress=False)
    new_data(folder / "test.h5", 7, first_id=700, seed=2, split="test")
    return folder


@pytest.fixture
def invoke(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, status=0):
        given = ["--features", template / "test.h5", "--annotations", template / "test.json", "--device", "cpu"]
        done = CliRunner().invoke(evaluate_decoder, [str(a) for a in (*given, "--output", "e.json", *arguments)])
        assert done.exit_code == status, done.output
        return done.output

    return run


def test_command_prints_scores_then_statistics_then_unavailable_metrics(invoke, template, tmp_path):
    output = invoke("--checkpoint", template / "a", "--beam-size", 2)
    tree = json.loads((tmp_path / "e.json").read_text())
    lines = [f"{name:<17} {value:8.4f}" for name, value in tree["metrics"].items()]
    assert len(lines) == 8
    statistics = tree["statistics"]
    lines += [
        f"distinct words    {statistics['distinct_words']:8} of {statistics['vocabulary_words']} in the vocabulary",
        f"distinct captions {statistics['distinct_captions']:8.1%} of the captions",
        f"novel captions    {statistics['novel_captions']:8.1%} not among the training captions",
        f"mean length       {statistics['mean_length']:8.2f} words; references: 3.",
        "METEOR            not available: requires Java",
        "SPICE             not available: requires Java",
    ]
    places = [output.index(line) for line in lines]
    assert places == sorted(places)
    assert "beam 2" in output
    assert {p.name for p in tmp_path.glob("e.*")} == {"e.json", "e.scores.csv", "e.coco-results.json"}


def test_several_checkpoints_form_an_ensemble(invoke, template, tmp_path):
    perplexities = []
    for chosen in (["a"], ["b"], ["a", "b"]):
        output = invoke(*[part for name in chosen for part in ("--checkpoint", template / name)])
        assert all(str(template / name) in output for name in chosen)
        perplexities.append(json.loads((tmp_path / "e.json").read_text())["metrics"]["perplexity"])
    a, b, both = perplexities
    assert both not in (a, b)
    assert both < max(a, b)


def test_decoding_sample_samples_captions(invoke, template, tmp_path):
    outputs = []
    for seed in (1, 2):
        options = ["--decoding", "sample", "--temperature", 3, "--top-k", 9, "--seed", seed]
        output = invoke("--checkpoint", template / "a", *options)
        assert f"sampled at temperature 3, top_k 9, seed {seed}" in output
        outputs.append((tmp_path / "e.coco-results.json").read_text())
    assert outputs[0] != outputs[1]


def test_missing_training_captions_only_omit_novel_captions(invoke, template, tmp_path):
    (template / "train.json").rename(template / "moved.json")
    try:
        output = invoke("--checkpoint", template / "a")
    finally:
        (template / "moved.json").rename(template / "train.json")
    assert f"novel captions    not available: requires the training captions: {template / 'train.json'}: " in output
    assert "novel_captions" not in json.loads((tmp_path / "e.json").read_text())["statistics"]


def test_contradictory_options_are_rejected(invoke, template, tmp_path):
    output = invoke("--checkpoint", template / "a", "--decoding", "beam", "--top-k", 5, status=2)
    assert "top_k" in output
    assert not (tmp_path / "e.json").exists()
