"""COCO caption metrics: BLEU, METEOR, ROUGE-L, CIDEr, and SPICE from pycocoevalcap, and our CIDEr-D."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from gridcap.train.data.tokenizers.base import Tokenizer
from gridcap.train.data.tokenizers.words import WORDS
from gridcap.train.metrics.ciderd import CiderD
from gridcap.train.metrics.java import ImageScores, JavaError, meteor, spice

Captions = Mapping[int, Sequence[str]]
_Texts = dict[int, list[str]]


@dataclass
class Scores:
    """Result of an evaluation.

    Attributes:
        values: metric -> score. BLEU, METEOR, ROUGE-L, and SPICE are in [0, 1], CIDEr and CIDEr-D in [0, 10], as on
            the COCO evaluation server (papers multiply by 100).
        per_image: image id -> metric -> score of its caption. The value of ROUGE-L, CIDEr, CIDEr-D, and SPICE is the
            mean over the images; BLEU and METEOR aggregate counts instead.
        tokenizer: name of the tokenizer of the captions.
        unit: noun for the tokenizer's units, on which all metrics are computed.
        unavailable: metric -> reason why it was not computed.
    """

    values: dict[str, float]
    per_image: dict[int, dict[str, float]]
    tokenizer: str
    unit: str = "word"
    unavailable: dict[str, str] = field(default_factory=dict)


def cider(candidates: Mapping[int, str], references: Captions, tokenizer: Tokenizer = WORDS) -> float:
    """Return the CIDEr that `score_captions` computes; fast, for selecting checkpoints.

    Args:
        candidates: image id -> caption.
        references: image id -> captions; document frequencies are counted over the images of the candidates.
        tokenizer: tokenizer whose units are compared.
    """
    tokens = [tokenizer.split(text) for text in candidates.values()]
    reference_tokens = [[tokenizer.split(text) for text in references[i]] for i in candidates]
    return float(CiderD(reference_tokens).scores(range(len(tokens)), tokens).mean())


def score_captions(candidates: Mapping[int, str], references: Captions, tokenizer: Tokenizer = WORDS) -> Scores:
    """Compute all metrics that are available on this machine.

    Captions are split by the tokenizer of training and of the SCST reward. For languages with spaces, that is a Python
    version of Stanford's PTB tokenizer, which the COCO evaluation server uses; see `ptb_tokenize` for the differences.
    METEOR needs Java, SPICE also Stanford's CoreNLP models, and both are only defined for words. Unavailable metrics
    are listed with the reason.

    CIDEr and CIDEr-D agree: the COCO server and pycocoevalcap implement CIDEr-D under the name CIDEr. Papers use
    either name.

    Args:
        candidates: image id -> caption, at least one.
        references: image id -> captions; document frequencies are counted over the images of the candidates.
        tokenizer: tokenizer whose units are compared.
    """
    truth = {i: [" ".join(tokenizer.split(text)) for text in references[i]] for i in candidates}
    results = {i: [" ".join(tokenizer.split(text))] for i, text in candidates.items()}
    scores = Scores({}, {i: {} for i in candidates}, tokenizer.name, tokenizer.unit)
    bleu, bleus = Bleu(4).compute_score(truth, results, verbose=0)
    for n in range(4):
        _add(scores, f"BLEU-{n + 1}", bleu[n], truth, bleus[n])
    _add_java(scores, "METEOR", meteor, truth, results)
    for name, metric in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        value, each = metric.compute_score(truth, results)
        _add(scores, name, value, truth, each)
    ciderd = CiderD([[text.split() for text in texts] for texts in truth.values()])
    ciderds = ciderd.scores(range(len(truth)), [results[i][0].split() for i in truth])
    _add(scores, "CIDEr-D", ciderds.mean(), truth, ciderds)
    _add_java(scores, "SPICE", spice, truth, results)
    return scores


def _add(scores: Scores, name: str, value: float, images: Iterable[int], each: Iterable[float]) -> None:
    scores.values[name] = float(value)
    for image, score in zip(images, each, strict=True):
        scores.per_image[image][name] = float(score)


def _add_java(
    scores: Scores, name: str, metric: Callable[[_Texts, _Texts], ImageScores], truth: _Texts, results: _Texts
) -> None:
    """Add a metric that runs in Java, or the reason why it is unavailable."""
    if scores.tokenizer != WORDS.name:
        scores.unavailable[name] = f"only defined for languages with spaces, not for {scores.tokenizer}"
        return
    try:
        value, each = metric(truth, results)
    except JavaError as error:
        scores.unavailable[name] = str(error)
    else:
        _add(scores, name, value, truth, each)
