import json
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from common.config import CaptionConfig
from common.errors import MismatchError
from train.checkpoint import load_checkpoint
from train.evaluate import evaluate, write_evaluation
from train.loop import fit
from train.search import beam_search

SEARCH = CaptionConfig(beam_size=3, max_length=6, batch_size=4, length_penalty=0.7)

pytestmark = pytest.mark.usefixtures("no_java")


@pytest.fixture(scope="module")
def run(tmp_path_factory, new_data, new_config):
    """A short run, and other images to evaluate it on: one refused, one to three references each."""
    folder = tmp_path_factory.mktemp("evaluate")
    fit(new_config(folder / "run", epochs=3), new_data(folder / "train.h5"), None, False, progress=False)
    test = new_data(folder / "test.h5", 11, first_id=700, seed=2, rejects={4: "truncated"})
    return load_checkpoint(folder / "run"), test


@pytest.fixture
def evaluation(run):
    return evaluate(*run, SEARCH, "cpu", progress=False)


def grid_of(data, position):
    return torch.from_numpy(data.store.row(int(data.rows[position]))).float().reshape(1, 4, 8)


def perplexity_by_hand(checkpoint, data):
    losses = []
    for position, captions in enumerate(data.captions):
        memory = checkpoint.decoder.encode(grid_of(data, position))
        for text in captions:
            tokens = torch.tensor(checkpoint.vocabulary.encode(text, 8))
            with torch.no_grad():
                logits = checkpoint.decoder(memory, tokens[None, None, :-1])[0, 0]
            losses += F.cross_entropy(logits, tokens[1:], reduction="none").tolist()
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_the_exponential_of_the_mean_loss_over_every_word_of_every_reference(run, evaluation):
    assert evaluation.scores.values["perplexity"] == pytest.approx(perplexity_by_hand(*run), rel=1e-5)


def test_captions_are_those_of_beam_search_on_each_image_alone(run, evaluation):
    checkpoint, data = run
    for position, row in enumerate(data.rows):
        (found,) = beam_search(checkpoint.decoder, grid_of(data, position), 3, 6, 0.7)
        assert evaluation.captions[int(data.store.image_ids[row])] == checkpoint.vocabulary.decode(found.tokens)


def test_every_usable_image_has_its_caption_name_and_references(run, evaluation):
    _, data = run
    ids = [700 + i for i in range(11) if i != 4]
    assert list(evaluation.captions) == list(evaluation.file_names) == list(evaluation.references) == ids
    assert evaluation.file_names == {i: f"{i}.jpg" for i in ids}
    assert list(evaluation.references.values()) == data.captions


def test_the_batch_size_changes_no_caption_and_no_score(run, evaluation):
    other = evaluate(*run, SEARCH.model_copy(update={"batch_size": 50}), "cpu", progress=False)
    assert other.captions == evaluation.captions
    assert other.scores.values == pytest.approx(evaluation.scores.values, rel=1e-5)


def test_max_length_bounds_the_captions(run):
    short = evaluate(*run, SEARCH.model_copy(update={"max_length": 2}), "cpu", progress=False)
    assert max(len(text.split()) for text in short.captions.values()) <= 2


def test_features_of_another_provenance_are_refused_with_the_difference(run, tmp_path, new_data):
    other = new_data(tmp_path / "other.h5", 6, layer="Mixed_6e")
    with pytest.raises(MismatchError, match=r"Mixed_7c.*Mixed_6e"):
        evaluate(run[0], other, SEARCH, "cpu", progress=False)


def test_written_files_hold_metrics_captions_and_cocos_results(run, evaluation, tmp_path):
    path = tmp_path / "new" / "test.json"
    results = write_evaluation(evaluation, path)
    tree = json.loads(path.read_text())
    assert set(tree) == {"metrics", "tokenizer", "left_out", "captions"}
    assert tree["metrics"] == evaluation.scores.values
    assert set(tree["left_out"]) == {"METEOR", "SPICE"}
    assert tree["captions"][0] == {
        "image_id": 700, "file_name": "700.jpg", "caption": evaluation.captions[700],
        "references": list(evaluation.references[700]),
    }  # fmt: skip
    assert len(tree["captions"]) == 10
    assert results == tmp_path / "new" / "test.coco-results.json"
    expected = [{"image_id": i, "caption": text} for i, text in evaluation.captions.items()]
    assert json.loads(results.read_text()) == expected


def test_a_perplexity_beyond_any_float_is_still_written_as_valid_json(run, tmp_path):
    checkpoint, data = load_checkpoint(run[0].path), run[1]
    with torch.no_grad():
        checkpoint.decoder.output.weight *= 1e4
    found = evaluate(checkpoint, data, SEARCH, "cpu", progress=False)
    write_evaluation(found, tmp_path / "e.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "e.json").read_text(), parse_constant=refuse)
