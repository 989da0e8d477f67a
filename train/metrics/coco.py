"""COCO caption metrics: BLEU, METEOR, ROUGE-L, CIDEr, and SPICE from pycocoevalcap, and our CIDEr-D."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from gridcap.train.data.tokenizer import ptb_tokenize
from gridcap.train.metrics.ciderd import CiderD
from gridcap.train.metrics.java import ImageScores, JavaError, meteor, ptb_tokenize_java, spice

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
        tokenizer: tokenizer of the captions.
        unavailable: metric -> reason why it was not computed.
    """

    values: dict[str, float]
    per_image: dict[int, dict[str, float]]
    tokenizer: str
    unavailable: dict[str, str] = field(default_factory=dict)


def cider(candidates: Mapping[int, str], references: Captions) -> float:
    """Return the CIDEr that `score_captions` computes without Java; fast, for selecting checkpoints.

    Args:
        candidates: image id -> caption.
        references: image id -> captions; document frequencies are counted over the images of the candidates.
    """
    tokens = [ptb_tokenize(text) for text in candidates.values()]
    reference_tokens = [[ptb_tokenize(text) for text in references[i]] for i in candidates]
    return float(CiderD(reference_tokens).scores(range(len(tokens)), tokens).mean())


def score_captions(candidates: Mapping[int, str], references: Captions) -> Scores:
    """Compute all metrics that are available on this machine.

    With Java, captions are tokenized by Stanford's PTB tokenizer, as on the COCO evaluation server, and METEOR is
    computed; SPICE also needs Stanford's CoreNLP models. Unavailable metrics are listed with the reason. Without
    Java, captions are tokenized by `ptb_tokenize`, which agrees on nearly all captions, so the scores are nearly the
    same. It differs for emoticons, emoji, fractions such as "1½", "ok?yes" without a space, and rare abbreviations.

    CIDEr and CIDEr-D agree: the COCO server and pycocoevalcap implement CIDEr-D under the name CIDEr. Papers use
    either name.

    Args:
        candidates: image id -> caption, at least one.
        references: image id -> captions; document frequencies are counted over the images of the candidates.
    """
    truth: _Texts = {i: [_normalize(text) for text in references[i]] for i in candidates}
    results: _Texts = {i: [_normalize(text)] for i, text in candidates.items()}
    tokenizer, truth, results = _tokenize(truth, results)
    scores = Scores({}, {i: {} for i in candidates}, tokenizer)
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
    try:
        value, each = metric(truth, results)
    except JavaError as error:
        scores.unavailable[name] = str(error)
    else:
        _add(scores, name, value, truth, each)


def _normalize(text: str) -> str:
    """Compose characters and collapse white space: the PTB tokenizer starts a new caption at any line break."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _tokenize(truth: _Texts, results: _Texts) -> tuple[str, _Texts, _Texts]:
    """Return the name of the tokenizer and both sets of captions, with tokens joined by spaces."""
    texts = [text for part in (truth, results) for captions in part.values() for text in captions]
    try:
        tokenized = ptb_tokenize_java(texts)
        name = "PTB (Stanford, Java)"
    except JavaError as error:
        tokenized = [" ".join(ptb_tokenize(text)) for text in texts]
        name = f"gridcap's approximation of PTB ({error})"
    remaining = iter(tokenized)
    both = [{i: [next(remaining) for _ in captions] for i, captions in part.items()} for part in (truth, results)]
    return name, both[0], both[1]
