"""Captioner: encoder and decoder behind one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from gridcap.caption.result import Caption
from gridcap.common.config import CaptionConfig
from gridcap.common.device import choose_device
from gridcap.common.errors import InvalidImageError, MismatchError, UserError, WeightsError
from gridcap.common.image import decoder_name, load_image, load_view
from gridcap.common.retry import retry_transient_errors
from gridcap.common.sources.registry import ImageFile
from gridcap.common.store.codecs import find_codec
from gridcap.common.store.provenance import check_same_features
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.keras_weights import is_keras_file
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.registry import Encoder, EncoderSettings, find_encoder
from gridcap.extract.encoders.weights import read_state_dict
from gridcap.train.decoding.base import Hypothesis
from gridcap.train.decoding.generate import generate_captions, generate_nbest
from gridcap.train.engine.checkpoint import Checkpoint
from gridcap.train.ensemble import load_ensemble


class Captioner:
    """Generate captions for photos with a trained decoder and the encoder that its features came from.

    The encoder, its weights, and the preprocessing are restored from the checkpoint's provenance and checked against
    it, so a photo is processed exactly as the training images were.

    Args:
        checkpoint: decoder to use, or an ensemble from `load_ensemble`.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        weights: weights file of the encoder; required if the features were extracted with a local weights file.
            None selects the weights that the provenance names.

    Attributes:
        checkpoint: the decoder with its vocabulary and configuration.
        provenance: how the training features were extracted.
        trained_on_nvjpeg: whether the training images were decoded by nvJPEG. Captioner decodes with Pillow, so pixel
            values may differ slightly.

    Raises:
        WeightsError: the encoder or its weights are not available.
        MismatchError: the weights or the preprocessing differ from those of the training features.

    Example:
        >>> captioner = Captioner.load("runs/mine")
        >>> captioner("photo.jpg").text
        'a dog runs along the beach'
        >>> [caption.log_prob for caption in captioner(["a.jpg", "b.jpg"], beam_size=5)]
        [-7.9, -9.3]
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto", weights: str | Path | None = None) -> None:
        self.checkpoint = checkpoint
        self.provenance = provenance = checkpoint.provenance
        encoder = _find_encoder(checkpoint)
        name, dtype = provenance["encoder"], provenance["dtype"]
        preprocessing = provenance["preprocessing"]
        self._resize_mode = preprocessing["resize_mode"]
        self._scaled_decoding = preprocessing.get("jpeg_scaled_decoding", False)
        self.trained_on_nvjpeg = preprocessing.get("decoder") == "nvjpeg"
        identity = encoder.identify_weights(_weights_source(checkpoint.path, provenance, encoder, weights))
        options = EncoderOptions(device=device, dtype=dtype)
        available = describe_features(encoder, identity, options, self._resize_mode, decoder_name())
        available["preprocessing"]["jpeg_scaled_decoding"] = self._scaled_decoding
        if self.trained_on_nvjpeg:
            # Single photos are decoded by Pillow. Rejecting the mismatch would leave such decoders without any photo.
            available["preprocessing"]["decoder"] = "nvjpeg"
        try:
            check_same_features(provenance, available, f"{checkpoint.path} was trained on", "this encoder produces")
        except MismatchError:
            if weights is not None and identity.file is not None and not is_keras_file(identity.file):
                read_state_dict(identity.file)  # a file that contains no weights at all has a better explanation
            raise
        self._codec = find_codec(dtype)
        read_as = replace(options, dtype=self._codec.read.name)
        self._encoder = GridEncoder(name, identity, read_as, _encoder_settings(provenance))
        self._device = choose_device(device)
        self._decoder = checkpoint.decoder.to(self._device)

    @classmethod
    def load(
        cls, path: str | Path, *others: str | Path, device: str = "auto", weights: str | Path | None = None
    ) -> Captioner:
        """Load a captioner from a run or checkpoint folder; several folders form an ensemble.

        Args:
            path: folder of a run (the best checkpoint is used) or of a checkpoint.
            others: further folders of the ensemble.
            device: see `Captioner`.
            weights: see `Captioner`.

        Raises:
            CheckpointError: a checkpoint is missing or corrupted.
            MismatchError: the checkpoints differ in features or vocabulary; see also `Captioner`.
            WeightsError: see `Captioner`.
        """
        return cls(load_ensemble([Path(folder) for folder in (path, *others)]), device, weights)

    @property
    def has_attention(self) -> bool:
        """Whether the decoder returns attention weights."""
        return self.checkpoint.decoder.has_attention

    @overload
    def __call__(self, images: str | Path, **options: Any) -> Caption: ...
    @overload
    def __call__(self, images: Sequence[str | Path], **options: Any) -> list[Caption]: ...
    def __call__(self, images: str | Path | Sequence[str | Path], **options: Any) -> Caption | list[Caption]:
        """Caption one image or several, and keep the images for display in a notebook.

        Args:
            images: one file, or a sequence of files, which are processed in batches.
            options: fields of `CaptionConfig`: beam_size, max_length, decoding="sample", temperature, ...

        Returns:
            One caption for one file; a list of captions, in the same order, for a sequence.

        Raises:
            InvalidImageError: a file cannot be used.
            pydantic.ValidationError: an option is unknown or its value is not allowed.
        """
        if isinstance(images, str | Path):
            return self([images], **options)[0]
        settings = CaptionConfig(**options)
        paths, captions = [Path(image) for image in images], []
        for start in range(0, len(paths), settings.batch_size):
            batch = paths[start : start + settings.batch_size]
            results = self.caption(batch, settings)
            captions += [
                replace(caption, image=self.display_image(path)) for caption, path in zip(results, batch, strict=True)
            ]
        return captions

    def caption(
        self, images: Sequence[Path], settings: CaptionConfig, generator: torch.Generator | None = None
    ) -> list[Caption]:
        """Caption one batch of images.

        Args:
            images: B files.
            settings: decoding options.
            generator: random number generator for sampling. Using the same one for all batches makes the captions
                independent of the batch size (see `generate_captions`).

        Returns:
            B captions in the order of the images.

        Raises:
            InvalidImageError: a file cannot be used, or a feature value exceeds the range of the dtype. To skip such
                files, call `preprocess` on each of them, then `caption_pixels`.
        """
        pixels = []
        for path in images:
            with _naming(path):
                pixels.append(self.preprocess(path))
        captions = []
        for path, caption in zip(images, self.caption_pixels(np.stack(pixels), settings, generator), strict=True):
            if isinstance(caption, InvalidImageError):
                raise InvalidImageError(caption.reason, caption.hint, str(path))
            captions.append(caption)
        return captions

    def caption_pixels(
        self,
        pixels: np.ndarray,
        settings: CaptionConfig,
        generator: torch.Generator | None = None,
    ) -> list[Caption | InvalidImageError]:
        """Caption a batch of preprocessed images.

        Args:
            pixels: uint8 (B, side, side, 3), from `preprocess`.
            settings, generator: see `caption`.

        Returns:
            B captions, or the error for an image with a feature value that exceeds the range of the dtype.
        """
        grids, valid = self._encode(pixels)
        results: list[Caption | InvalidImageError] = [self._out_of_range()] * len(pixels)
        if valid.any():
            to_units = self.checkpoint.vocabulary.scoring_units
            hypotheses = generate_captions(self._decoder, grids[torch.from_numpy(valid)], settings, generator, to_units)
            for position, hypothesis in zip(np.flatnonzero(valid), hypotheses, strict=True):
                results[position] = self._to_caption(hypothesis)
        return results

    def preprocess(self, image: ImageFile) -> np.ndarray:
        """Return the encoder input of one image, uint8 (side, side, 3), RGB.

        Raises:
            InvalidImageError: the file cannot be used. The message is the reason alone, without the file name.
            ReadError: the disk or the network failed repeatedly.
        """
        return retry_transient_errors(
            lambda: load_image(image, self._encoder.side, self._resize_mode, self._scaled_decoding), str(image)
        )

    def display_image(self, image: ImageFile, max_size: int = 480) -> np.ndarray:
        """Return the part of an image that the grid covers, for display.

        That is the whole image in its own aspect ratio if it is stretched for the encoder, or the cropped or padded
        square.

        Args:
            image: image file.
            max_size: maximum of height and width in pixels.

        Returns:
            uint8 (H, W, 3), RGB.

        Raises:
            InvalidImageError: the file cannot be used.
        """
        with _naming(image):
            return retry_transient_errors(
                lambda: load_view(image, self._encoder.side, self._resize_mode, max_size), str(image)
            )

    def alternatives(self, image: Path, settings: CaptionConfig, seed: int = 0) -> list[Caption]:
        """Return several captions of one image, with the image.

        Args:
            image: image file.
            settings: decoding options. `beam_size` is the number of hypotheses or samples.
            seed: random seed for sampling.

        Returns:
            The final hypotheses of beam search, best first; or the distinct samples, most probable first.

        Raises:
            InvalidImageError: the file cannot be used.
        """
        with _naming(image):
            grid, valid = self._encode(self.preprocess(image)[None])
            if not valid.all():
                raise self._out_of_range()
        if settings.decoding == "beam":
            to_units = self.checkpoint.vocabulary.scoring_units
            (hypotheses,) = generate_nbest(self._decoder, grid, settings, to_units=to_units)
        else:
            generator = torch.Generator().manual_seed(seed)
            samples = generate_captions(self._decoder, grid.expand(settings.beam_size, -1, -1), settings, generator)
            distinct = {self.checkpoint.vocabulary.decode(sample.tokens): sample for sample in samples}
            hypotheses = sorted(distinct.values(), key=lambda hypothesis: -hypothesis.log_prob)
        display = self.display_image(image)
        return [replace(self._to_caption(hypothesis), image=display) for hypothesis in hypotheses]

    def _encode(self, pixels: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Encode a batch of preprocessed images.

        Args:
            pixels: uint8 (B, side, side, 3).

        Returns:
            Grids (B, P, C) on the device, rounded like the stored features, and a boolean mask (B,) of those whose
            values are in the range of the dtype.
        """
        encoded = self._encoder.encode(pixels)
        valid = np.asarray(np.isfinite(encoded).reshape(len(encoded), -1).all(1))
        if not valid.all():
            encoded = np.where(valid[:, None, None, None], encoded, encoded.dtype.type(0))
        grids = torch.from_numpy(self._codec.round_trip(encoded))
        rows, columns, channels = self._encoder.grid_shape
        return grids.to(self._device).float().reshape(len(grids), rows * columns, channels), valid

    def _out_of_range(self) -> InvalidImageError:
        return InvalidImageError(
            f"a feature value exceeds the range of {self._codec.read.name}, so it cannot be captioned",
            "train on float32 features (extract-features --dtype float32)",
        )

    def _to_caption(self, hypothesis: Hypothesis) -> Caption:
        vocabulary, (rows, columns, _) = self.checkpoint.vocabulary, self._encoder.grid_shape
        attention = hypothesis.attention
        return Caption(
            text=vocabulary.decode(hypothesis.tokens),
            tokens=vocabulary.texts(hypothesis.tokens),
            log_prob=hypothesis.log_prob,
            attention=None if attention is None else attention.reshape(-1, rows, columns),
        )


@contextlib.contextmanager
def _naming(image: ImageFile) -> Iterator[None]:
    """Name the image in errors of the block."""
    try:
        yield
    except InvalidImageError as error:
        raise InvalidImageError(error.reason, error.hint, str(image)) from error


def _encoder_settings(provenance: Mapping[str, Any]) -> EncoderSettings:
    """Return the settings of the encoder that made the features."""
    preprocessing = provenance["preprocessing"]
    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    return EncoderSettings(provenance["layer"], preprocessing["side"], mean, std)


def _find_encoder(checkpoint: Checkpoint) -> Encoder:
    """Return the encoder that made the features of a checkpoint.

    Raises:
        WeightsError: the features were imported, or the encoder belongs to a package that is not installed.
    """
    provenance = checkpoint.provenance
    name, weights = provenance["encoder"], provenance["weights"]["name"]
    what = f"{checkpoint.path}: trained on features of {name} ({weights})"
    if "side" not in provenance["preprocessing"]:
        raise WeightsError(
            f"{what}, which is not a Gridcap encoder", "to caption new photos, train on features from extract-features"
        )
    try:
        return find_encoder(name, _encoder_settings(provenance))
    except UserError as error:
        raise WeightsError(f"{what}, which is not available: {error.message}", error.hint) from error


def _weights_source(
    checkpoint: Path, provenance: Mapping[str, Any], encoder: Encoder, weights: str | Path | None
) -> str:
    """Return the weights argument for `Encoder.identify_weights`: the given file, or the recorded weights."""
    name = provenance["weights"]["name"]
    if weights is not None:
        return str(weights)
    if provenance["weights"]["random"]:
        return str(name)
    if (argument := encoder.weights_argument(name)) is not None:
        return argument
    raise WeightsError(
        f"{checkpoint}: trained on features from the local weights file {name}",
        f"pass that file: --weights path/to/{name}",
    )
