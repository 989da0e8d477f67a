"""Subwords by Hugging Face tokenizers: BPE trained on the captions, or any tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gridcap.common.errors import PathError, UserError, first_line
from gridcap.train.data.tokenizers.base import UNKNOWN, Tokenizer, tokenizer_from_json


class Subwords:
    """Units of a Hugging Face tokenizer.

    Args:
        model: content of a tokenizer.json.
        scoring: tokenizer of metrics, which compare words or characters.

    Raises:
        ValueError: the model is invalid.
        UserError: the library tokenizers is not installed.
    """

    unit, name = "subword", "Hugging Face tokenizers"
    reversible = False  # the same text may consist of other subwords

    def __init__(self, model: str, scoring: Tokenizer) -> None:
        library = _library()
        try:
            self._tokenizer = library.Tokenizer.from_str(model)
        except Exception as error:  # the library raises plain exceptions
            raise ValueError(f"not a tokenizer: {first_line(error)}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._unknown = _unknown_token(json.loads(self._tokenizer.to_str())["model"])
        self.scoring = scoring

    def split(self, caption: str) -> list[str]:
        """Return the subwords of a caption."""
        tokens = self._tokenizer.encode(caption, add_special_tokens=False).tokens
        return [UNKNOWN if token == self._unknown else token for token in tokens]

    def units(self) -> list[str]:
        """Return all units of the model, including those that only occur within others in the training captions."""
        return [unit for unit in self._tokenizer.get_vocab() if unit != self._unknown]

    def join(self, units: Sequence[str]) -> str:
        """Return the text of subwords."""
        decoder = self._tokenizer.decoder
        text: str = " ".join(units) if decoder is None else decoder.decode(list(units))
        return text.strip()

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as plain values."""
        model = json.loads(self._tokenizer.to_str())
        return {"kind": "subwords", "scoring": self.scoring.to_json(), "model": model}


def from_json(saved: dict[str, Any]) -> Subwords:
    """Return the tokenizer of `Subwords.to_json`."""
    return Subwords(json.dumps(saved["model"]), tokenizer_from_json(saved["scoring"]))


def train_bpe(captions: Iterable[str], size: int, min_count: int, scoring: Tokenizer) -> Subwords:
    """Train byte-pair encoding on captions (Sennrich et al. 2016, arXiv:1508.07909): lowercase, with punctuation.

    Args:
        captions: captions of the training split.
        size: maximum number of subwords.
        min_count: minimum count of a pair of subwords to be merged.
        scoring: tokenizer of metrics.
    """
    library = _library()
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = library.Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size + 1,  # UNKNOWN included
        min_frequency=min_count,
        limit_alphabet=max(1, size // 2),  # Chinese captions have thousands of characters
        special_tokens=[UNKNOWN],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return Subwords(tokenizer.to_str(), scoring)


def read_tokenizer(path: Path, scoring: Tokenizer) -> Subwords:
    """Read a tokenizer.json.

    Raises:
        PathError: there is no such file.
        UserError: the file is not a tokenizer, or the library tokenizers is not installed.
    """
    try:
        return Subwords(path.read_text(encoding="utf-8"), scoring)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise PathError(
            f"{path}: no such file (train.tokenizer)",
            "pass words, characters, bpe, auto, or the path of a tokenizer.json",
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}", "pass a tokenizer.json written by Hugging Face tokenizers") from error


def _unknown_token(model: dict[str, Any]) -> str | None:
    if model.get("unk_token") is not None:
        return str(model["unk_token"])
    if model.get("unk_id") is not None:  # Unigram
        return str(model["vocab"][model["unk_id"]][0])
    return None


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "subword tokenizers require the library tokenizers, which is not installed",
            "pip install 'gridcap[tokenizers]'",
        ) from error
    return tokenizers
