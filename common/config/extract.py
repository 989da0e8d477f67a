"""Stage one's settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from gridcap.common.config.section import Section

Precision = Literal["auto", "float32", "bfloat16", "float16"]
StoredType = Literal["float16", "float32", "uint8"]
View = Literal["original", "hflip"]
ResizeMode = Literal["stretch", "crop", "letterbox"]
Compile = Literal["auto", "on", "off"]
JpegDecoder = Literal["pillow", "nvjpeg"]
EncoderName = Literal["inception_v3", "resnet50", "resnet101", "resnet152"]


class ExtractConfig(Section):
    """Stage one: images to grid features."""

    encoder: EncoderName = Field("inception_v3", description="the frozen CNN, from torchvision")
    weights: str = Field(
        "imagenet",
        description="imagenet (downloaded once), random[:SEED] (demo and tests only), or a .pth / .safetensors file",
    )
    resize_mode: ResizeMode = Field("stretch", description="how an image becomes square")
    precision: Precision = Field(
        "auto", description="arithmetic of the encoder; auto: bfloat16 where the hardware has it"
    )
    compile: Compile = Field(
        "auto", description="torch.compile for the encoder; auto: where a job of this size is known to gain by it"
    )
    jpeg_decoder: JpegDecoder = Field(
        "pillow", description="what decodes JPEG files: pillow, or nvjpeg (on the GPU; other pixels in the last digit)"
    )
    dtype: StoredType = Field(
        "float16", description="number type of the stored grids; uint8: half of float16, a scale per channel and image"
    )
    views: tuple[View, ...] = Field(
        ("original",), description="what to store of each image: original, or original,hflip (mirrored too)"
    )
    shard_size: PositiveInt = Field(1024, description="images in one shard")
    batch_size: PositiveInt | None = Field(
        None,
        description="images encoded together; a batch never crosses a shard's border; null: 32, on a GPU 256",
    )
    num_workers: PositiveInt | None = Field(
        None, description="threads that decode images; null: 4, beside a GPU as many as cores"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_reads_on_and_off_as_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return "on" if value else "off"
        return value

    @field_validator("views", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [view.strip() for view in value.split(",")] if isinstance(value, str) else value

    @field_validator("views")
    @classmethod
    def _original_first(cls, value: tuple[View, ...]) -> tuple[View, ...]:
        if value[:1] != ("original",) or len(set(value)) < len(value):
            raise ValueError("must begin with original and name no view twice")
        return value

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, value: str) -> str:
        if value.startswith("random") and not re.fullmatch(r"random(:\d+)?", value) and not Path(value).exists():
            raise ValueError("must be imagenet, random, random:SEED with a whole number, or a file")
        if not value.startswith(("imagenet", "random")) and not Path(value).suffix and not Path(value).exists():
            raise ValueError("must be imagenet, random, random:SEED, or the path of a .pth or .safetensors file")
        return value

    @model_validator(mode="after")
    def _half_needs_gpu(self) -> ExtractConfig:
        if self.precision == "float16" and self.device == "cpu":
            raise ValueError("precision float16 needs a GPU, and device is cpu: choose auto, float32 or bfloat16")
        return self

    @model_validator(mode="after")
    def _nvjpeg_needs_gpu(self) -> ExtractConfig:
        if self.jpeg_decoder == "nvjpeg" and self.device == "cpu":
            raise ValueError("decoder nvjpeg needs a GPU, and device is cpu: choose pillow")
        return self
