"""Settings of feature extraction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from gridcap.common.config.section import Section

Precision = Literal["auto", "float32", "bfloat16", "float16"]
StoredType = Literal["float16", "float32", "uint8", "float16-zstd"]
ResizeMode = Literal["stretch", "crop", "letterbox", "timm"]
Compile = Literal["auto", "on", "off"]
JpegDecoder = Literal["auto", "pillow", "turbo", "nvjpeg"]
ORIGINAL = "original"  # the view that every store has
Channels = tuple[float, float, float]


class ExtractConfig(Section):
    """Stage one: images to feature grids."""

    encoder: str = Field(
        "inception_v3", description="frozen encoder: inception_v3, resnet50, timm/NAME, ...; see gridcap encoders"
    )
    weights: str = Field(
        "imagenet",
        description="imagenet (downloaded once), random[:SEED] (demo and tests only), or a file: .pth, .safetensors, "
        "or Keras's .h5 or .keras (inception_v3); for timm also a tag",
    )
    layer: str | None = Field(
        None, description="layer whose output is the grid, for example Mixed_6e (default: the last feature map)"
    )
    image_size: PositiveInt | None = Field(
        None, description="side of the square input images in pixels (default: that of the encoder)"
    )
    mean: Channels | None = Field(None, description="per-channel mean of the input in [0, 1] (default: the encoder's)")
    std: Channels | None = Field(
        None, description="per-channel standard deviation of the input in [0, 1] (default: the encoder's)"
    )
    resize_mode: ResizeMode = Field(
        "stretch",
        description="how images are made square: stretch, center crop, letterbox (gray padding), or timm (the model's "
        "evaluation transform, crop included)",
    )
    precision: Precision = Field(
        "auto", description="encoder precision; auto: bfloat16 if the hardware supports it, else float32"
    )
    compile: Compile = Field(
        "auto", description="compile the encoder with torch.compile; auto: if the job is large enough to gain from it"
    )
    jpeg_decoder: JpegDecoder = Field(
        "auto",
        description="JPEG decoder: pillow; turbo (the same pixels, faster; pip install 'gridcap[fast]'); nvjpeg (GPU; "
        "pixel values may differ slightly); auto: nvjpeg with a GPU and a folder of images, else turbo if installed",
    )
    jpeg_scaled_decoding: bool = Field(
        True,
        description="reduce large JPEG files while they are decoded, to no less than twice the side of the encoder's "
        "input (more than twice as fast for 12 megapixels; pixel values may differ slightly; not with nvjpeg)",
    )
    dtype: StoredType = Field(
        "float16",
        description="how grids are stored: float16, float32, uint8 (half the size of float16, one scale per image and "
        "channel), or float16-zstd (compressed without loss)",
    )
    views: tuple[str, ...] = Field(
        ("original",),
        description="views stored per image, from which training samples: original first, then hflip (mirrored), "
        "five-crop (5 views), random-crop:N (N views)",
    )
    shard_size: PositiveInt = Field(1024, description="images per shard")
    batch_size: PositiveInt | None = Field(
        None,
        description="images per encoder batch (default: 32; on a GPU 256, or measured from 20,000 images on); "
        "batches do not span shards",
    )
    num_workers: PositiveInt | None = Field(
        None, description="image decoding threads (default: 4; one per core with a GPU)"
    )
    device: str = Field("auto", description="device: auto, cpu, cuda, cuda:1, ...")

    @field_validator("compile", mode="before")
    @classmethod
    def _booleans_to_on_and_off(cls, value: Any) -> Any:
        if isinstance(value, bool):  # YAML reads on and off as booleans
            return "on" if value else "off"
        return value

    @field_validator("views", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return [view.strip() for view in value.split(",")] if isinstance(value, str) else value

    @field_validator("views")
    @classmethod
    def _expand_views(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value != (ORIGINAL,):
            from gridcap.common.image.views import expand_views  # with Pillow, which takes time to load

            value = expand_views(value)
        if value[:1] != (ORIGINAL,) or len(set(value)) < len(value):
            raise ValueError("must start with original and contain no view twice")
        return value

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, value: str) -> str:
        if value.startswith("random") and not re.fullmatch(r"random(:\d+)?", value) and not Path(value).exists():
            raise ValueError("must be imagenet, random, random:SEED with an integer seed, or a file")
        return value

    @model_validator(mode="after")
    def _float16_needs_gpu(self) -> ExtractConfig:
        if self.precision == "float16" and self.device == "cpu":
            raise ValueError("precision float16 requires a GPU, but device is cpu: use auto, float32, or bfloat16")
        return self

    @model_validator(mode="after")
    def _nvjpeg_is_possible(self) -> ExtractConfig:
        if self.jpeg_decoder == "nvjpeg" and self.device == "cpu":
            raise ValueError("jpeg_decoder nvjpeg requires a GPU, but device is cpu: use pillow")
        if self.jpeg_decoder == "nvjpeg" and self.resize_mode == "timm":
            raise ValueError("resize_mode timm requires jpeg_decoder: pillow")
        if self.jpeg_decoder == "nvjpeg" and self.views != (ORIGINAL,):
            from gridcap.common.image.views import select_view

            if cropped := [view for view in self.views if select_view(view).of_square is None]:
                raise ValueError(f"view {cropped[0]} requires jpeg_decoder: pillow")
        return self
