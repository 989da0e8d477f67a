"""Captioner: encoder and decoder behind one call."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from gridcap.common.config import CaptionConfig
from gridcap.common.device import choose_device
from gridcap.common.errors import ExtractionError, WeightsError
from gridcap.common.image import decoder_name, load_image, load_view
from gridcap.common.store.provenance import check_same_features
from gridcap.common.store.quantize import as_stored
from gridcap.common.store.shard import read_dtype
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.specs import ENCODERS
from gridcap.extract.encoders.weights import identify_weights, imagenet_name
from gridcap.train.decoding.base import Hypothesis
from gridcap.train.decoding.generate import generate_captions, generate_nbest
from gridcap.train.engine.checkpoint import Checkpoint
from gridcap.train.ensemble import load_ensemble


@dataclass(frozen=True)
class Caption:
    """A caption of one image.

    Attributes:
        text: the sentence.
        tokens: its words.
        log_prob: natural logarithm of its probability, as for `train.search.Hypothesis`.
        attention: (words, rows, columns) float32, where the decoder looked as it wrote each word; each sums to
            1 over the grid. None for a decoder without attention.
        image: uint8 (H, W, 3), what the grid covers of the photo, for showing; None if it was not kept.
    """

    text: str
    tokens: list[str]
    log_prob: float
    attention: np.ndarray | None = field(repr=False)
    image: np.ndarray | None = field(default=None, repr=False, compare=False)

    def _repr_html_(self) -> str:
        """For a notebook: the image, where the decoder looked at each word, and the caption."""
        said = f"{html.escape(self.text)} <small>(log-probability {self.log_prob:.2f})</small>"
        if self.image is None:
            return f"<p>{said}</p>"
        from gridcap.caption.attention_maps import attention_png, png

        whole = png(self.image) if self.attention is None else attention_png(self.image, self)
        data = base64.b64encode(whole).decode()
        alt = html.escape(self.text, quote=True)
        return (
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}" style="max-width: 100%">'
            f"<figcaption>{said}</figcaption></figure>"
        )


class Captioner:
    """Captions photos with a trained decoder and the very encoder its features came from.

    Args:
        checkpoint: the decoder, or an ensemble of several.
        device: auto, cpu, cuda, ...
        weights: the encoder's weights file, for a decoder trained on features from a local file; None finds
            them by the checkpoint's provenance.

    Attributes:
        provenance: of the features that the decoder was trained on.
        foreign_pixels: whether the decoder was trained on images decoded by nvJPEG, whose pixels differ a little.

    Raises:
        WeightsError: the weights cannot be had.
        MismatchError: they are not those of the training features.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto", weights: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self.provenance = provenance = checkpoint.provenance
        if provenance["encoder"] not in ENCODERS:
            raise WeightsError(
                f"{checkpoint.path}: was trained on {provenance['encoder']} features "
                f"({provenance['weights']['name']}), and their encoder is not known here",
                "new photos need a decoder trained on features made by extract-features",
            )
        self._device = choose_device(device)
        self._geometry = provenance["preprocessing"]["resize_mode"]
        name, dtype = provenance["encoder"], provenance["dtype"]
        identity = identify_weights(name, self._weights_source(weights))
        options = EncoderOptions(device=device, dtype=dtype)
        found = describe_features(name, identity, options, self._geometry, decoder_name())
        # Photos given one by one go through Pillow, also where a folder went through nvJPEG: refusing them
        # would leave such a decoder without any new photo. `foreign_pixels` says so.
        self.foreign_pixels = provenance["preprocessing"].get("decoder") == "nvjpeg"
        if self.foreign_pixels:
            found["preprocessing"]["decoder"] = "nvjpeg"
        check_same_features(provenance, found, f"{checkpoint.path} was trained on", "this encoder makes")
        self._stored = np.dtype(dtype)
        self._encoder = GridEncoder(name, identity, replace(options, dtype=read_dtype(self._stored).name))
        self._decoder = checkpoint.decoder.to(self._device)

    @classmethod
    def load(cls, *paths: str | Path, device: str = "auto", weights: Path | None = None) -> Captioner:
        """Load a run or a checkpoint, or several that decode together; else as for the class and `load_ensemble`."""
        return cls(load_ensemble([Path(path) for path in paths]), device, weights)

    def _weights_source(self, given: Path | None) -> str:
        name = self.provenance["weights"]["name"]
        if given is not None:
            return str(given)
        if self.provenance["weights"]["random"]:
            return str(name)
        if name == imagenet_name(self.provenance["encoder"]):
            return "imagenet"
        raise WeightsError(
            f"{self.checkpoint.path}: was trained on features from the weights file {name}",
            f"give that file: --weights path/to/{name}",
        )

    @property
    def has_attention(self) -> bool:
        """Whether the decoder says where it looked."""
        return self.checkpoint.decoder.has_attention

    @overload
    def __call__(self, images: str | Path, **options: Any) -> Caption: ...
    @overload
    def __call__(self, images: Sequence[str | Path], **options: Any) -> list[Caption]: ...
    def __call__(self, images: str | Path | Sequence[str | Path], **options: Any) -> Caption | list[Caption]:
        """Caption a photo, or many, with the pictures kept for a notebook.

            captioner = Captioner.load("runs/x")
            captioner("photo.jpg").text
            captioner(["a.jpg", "b.jpg"], beam_size=5)

        Args:
            images: a file, or several, which are captioned in batches.
            options: of `common.config.CaptionConfig`: beam_size, max_length, search="sample", temperature, ...

        Returns:
            A caption, or a list of them.

        Raises:
            InvalidImageError: a file cannot be used.
            pydantic.ValidationError: no such option, or no such value of it.
        """
        if isinstance(images, str | Path):
            return self([images], **options)[0]
        search = CaptionConfig(**options)
        paths, found = [Path(image) for image in images], []
        for start in range(0, len(paths), search.batch_size):
            some = paths[start : start + search.batch_size]
            captions = self.caption(some, search)
            found += [replace(one, image=self.view(path)) for one, path in zip(captions, some, strict=True)]
        return found

    def caption(
        self, images: Sequence[Path], search: CaptionConfig, generator: torch.Generator | None = None
    ) -> list[Caption]:
        """Caption a batch of images.

        Args:
            images: files.
            search: beam search or sampling, and its options.
            generator: for sampling; one for all batches makes the captions independent of their size (see
                `generate_captions`).

        Returns:
            A caption an image, in their order.

        Raises:
            InvalidImageError: a file cannot be used; filter with `load_image` first.
        """
        return self.caption_squares(np.stack([self.square(path) for path in images]), search, generator)

    def square(self, image: Path) -> np.ndarray:
        """The image as the encoder sees it, uint8 (side, side, 3). Raises InvalidImageError."""
        return load_image(image, self._encoder.side, self._geometry)

    def view(self, image: Path, longest: int = 480) -> np.ndarray:
        """What the grid covers of an image, for showing: uint8 (H, W, 3), in its own proportions.

        The whole image when it was stretched, else the square that was cut or padded. Raises InvalidImageError.
        """
        return load_view(image, self._encoder.side, self._geometry, longest)

    def caption_squares(
        self, squares: np.ndarray, search: CaptionConfig, generator: torch.Generator | None = None
    ) -> list[Caption]:
        """As `caption`, from uint8 (B, side, side, 3)."""
        return [
            self._caption(found) for found in generate_captions(self._decoder, self._grids(squares), search, generator)
        ]

    def alternatives(self, image: Path, search: CaptionConfig, seed: int = 0) -> list[Caption]:
        """The captions that the beam ended with, the best first; or as many drawn ones as `beam_size` says.

        Args:
            image: a file.
            search: beam search or sampling, and its options.
            seed: for sampling; captions that are drawn twice are given once, the likeliest first.

        Raises:
            InvalidImageError: the file cannot be used.
        """
        grids = self._grids(np.stack([self.square(image)]))
        if search.decoding == "beam":
            (found,) = generate_nbest(self._decoder, grids, search)
        else:
            generator = torch.Generator().manual_seed(seed)
            drawn = generate_captions(self._decoder, grids.expand(search.beam_size, -1, -1), search, generator)
            found = sorted({tuple(one.tokens): one for one in drawn}.values(), key=lambda one: -one.log_prob)
        view = self.view(image)
        return [replace(self._caption(one), image=view) for one in found]

    def _grids(self, squares: np.ndarray) -> Tensor:
        """uint8 (B, side, side, 3) -> (B, P, C), as the decoder was trained to see them."""
        encoded = self._encoder.encode(squares)
        if not np.isfinite(encoded).all():
            raise ExtractionError(
                f"a grid holds a value that {encoded.dtype} cannot hold, so its image cannot be captioned",
                "train on float32 features (extract-features --dtype float32)",
            )
        grids = torch.from_numpy(as_stored(encoded, self._stored))
        rows, columns, channels = self._encoder.grid_shape
        return grids.to(self._device).float().reshape(len(grids), rows * columns, channels)

    def _caption(self, found: Hypothesis) -> Caption:
        vocabulary, (rows, columns, _) = self.checkpoint.vocabulary, self._encoder.grid_shape
        return Caption(
            vocabulary.decode(found.tokens),
            [vocabulary.tokens[token] for token in found.tokens],
            found.log_prob,
            None if found.attention is None else found.attention.reshape(-1, rows, columns),
        )
