"""An extraction: a request and the plan that it resolved to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from gridcap.common.captions.records import ImageRecord
from gridcap.common.config import ExtractConfig, PipelineConfig
from gridcap.common.device import choose_batch_size, choose_compile, choose_device
from gridcap.common.errors import MismatchError, UserError
from gridcap.common.store.codecs import codec_versions, find_codec
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.registry import Encoder, EncoderSettings, find_encoder
from gridcap.extract.encoders.weights import WeightsIdentity
from gridcap.extract.images.decoders import JpegDecoder, choose_decoder, decoder_of, load_decoder
from gridcap.extract.manifest import Image, ImageList
from gridcap.extract.plan import FILE, Plan, read_plan, store_folder
from gridcap.extract.planning import PlanRequest, ResolvedPlan, resolve_plan, save_plan
from gridcap.extract.tuning import LARGEST, MIN_IMAGES, choose_fastest_batch_size, measure_rate


@dataclass(frozen=True)
class ExtractionRequest:
    """A requested extraction.

    Attributes:
        config: resolved configuration.
        split: name of the split.
        records: images of the split; iterated more than once, never held in memory.
        images: folder of the images.
        output: index file of the store.
        append: add images that are new in the list.
        replace_empty: replace a different plan that has no shard yet; for a single process.
        dry_run: do not download weights.
        threads: CPU threads per process; None: torch's default.
        adapt_plan: changes the requested plan before it is compared, for jobs on other hardware.
    """

    config: PipelineConfig
    split: str
    records: Iterable[ImageRecord]
    images: Path
    output: Path
    append: bool = False
    replace_empty: bool = False
    dry_run: bool = False
    threads: int | None = None
    adapt_plan: Callable[[Plan], Plan] | None = None


@dataclass(frozen=True)
class Extraction:
    """A request and the plan that it resolved to.

    Attributes:
        config: resolved configuration.
        images: folder of the images.
        output: index file of the store.
        identity: identity of the encoder's weights.
        request: the requested plan.
        resolved: the plan to use.
    """

    config: PipelineConfig
    images: Path
    output: Path
    identity: WeightsIdentity
    request: PlanRequest
    resolved: ResolvedPlan

    @property
    def plan(self) -> Plan:
        """The plan to use."""
        return self.resolved.plan

    @property
    def requested(self) -> Plan:
        """The plan as it would be without a store on disk."""
        return self.request.plan

    @property
    def folder(self) -> Path:
        """Folder of the shards."""
        return self.request.folder

    def save(self) -> Extraction:
        """Write the plan if it is not on disk, and return the extraction with the plan that is.

        Raises:
            MismatchError: another process has saved a different plan in the meantime.
        """
        return replace(self, resolved=save_plan(self.request, self.resolved))

    def check_arithmetic(self) -> None:
        """Check that this machine computes like the one that started the store.

        Raises:
            MismatchError: the precision or the library versions differ.
        UserError: the JPEG decoder of the store is not available.
        """
        load_decoder(decoder_of(self.plan.provenance), choose_device(self.config.extract.device))
        _check_arithmetic(self.plan, self.requested, self.folder)


@dataclass(frozen=True)
class _Images:
    """The (image_id, file_name) of image records; can be iterated repeatedly."""

    records: Iterable[ImageRecord]

    def __iter__(self) -> Iterator[Image]:
        return ((record.image_id, record.file_name) for record in self.records)


def prepare(request: ExtractionRequest) -> Extraction:
    """Identify the weights, downloading them unless it is a dry run, and resolve the plan. Nothing else is written.

    Raises:
        AnnotationError: the image folder is empty.
        WeightsError: the weights are not available.
        UserError: the device is not available, or the folder of the shards is a file.
        MismatchError: the store on disk was planned differently.
    """
    config, folder = request.config, store_folder(request.output)
    images = _Images(request.records)
    next(iter(images), None)  # an empty image folder is reported before weights are downloaded
    encoder = find_encoder(config.extract.encoder, encoder_settings(config.extract))
    identity = encoder.identify_weights(config.extract.weights, download=not request.dry_run)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but the shards need a folder of this name", "choose another --output")
    stored = read_plan(folder) if (folder / FILE).exists() else None
    stored_decoder = None if stored is None else decoder_of(stored.provenance)
    decoder = choose_decoder(config.extract, request.images, choose_device(config.extract.device), stored_decoder)
    requested = _requested_plan(request, images, encoder, identity, decoder)
    if request.adapt_plan is not None:
        requested = request.adapt_plan(requested)
    auto_keys = {"compile"} if config.extract.compile == "auto" else set()
    if config.extract.batch_size is None:
        auto_keys.add("batch_size")
    if config.extract.precision == "auto" and request.output.exists() and not request.append:
        auto_keys.add("precision")  # a complete store keeps its precision, whatever "auto" means on this machine
    plan_request = PlanRequest(
        requested,
        images,
        folder,
        auto_keys,
        request.append,
        request.replace_empty and not request.output.exists(),
        request.images,
        config.data.max_invalid,
    )
    if request.append and stored is not None:
        _check_arithmetic(stored, requested, folder)
    resolved = resolve_plan(plan_request)
    extraction = Extraction(config, request.images, request.output, identity, plan_request, resolved)
    return extraction if request.dry_run or request.adapt_plan is not None else _choose_batch_size(extraction)


def _choose_batch_size(extraction: Extraction) -> Extraction:
    """Measure the fastest batch size for a large new store on a GPU, unless the user has set one.

    The plan then fixes it. Compiled encoders keep the default: each size would have to be compiled.
    """
    plan, extract = extraction.plan, extraction.config.extract
    is_new = plan is extraction.requested and plan.images >= MIN_IMAGES
    device = choose_device(extract.device)
    if extract.batch_size is not None or not is_new or device.type != "cuda" or plan.provenance["compile"]:
        return extraction
    options = EncoderOptions(extract.precision, extract.device, find_codec(extract.dtype).read.name)
    encoder = GridEncoder(extract.encoder, extraction.identity, options, encoder_settings(extract))
    size = choose_fastest_batch_size(partial(measure_rate, encoder), min(LARGEST, plan.shard_size))
    plan = replace(plan, batch_size=size)
    request, resolved = replace(extraction.request, plan=plan), replace(extraction.resolved, plan=plan)
    return replace(extraction, request=request, resolved=resolved)


def encoder_settings(extract: ExtractConfig) -> EncoderSettings:
    """Return the part of the configuration that changes the encoder."""
    return EncoderSettings(extract.layer, extract.image_size, extract.mean, extract.std)


def _requested_plan(
    request: ExtractionRequest,
    images: Iterable[Image],
    encoder: Encoder,
    identity: WeightsIdentity,
    decoder: JpegDecoder,
) -> Plan:
    extract = request.config.extract
    device = choose_device(extract.device)
    image_list = ImageList.from_images(images, extract.shard_size)
    compiled = choose_compile(extract.compile, image_list.images, device)
    options = EncoderOptions(extract.precision, extract.device, extract.dtype, compiled)
    provenance = describe_features(
        encoder, identity, options, encoder.spec.resolve_resize_mode(extract.resize_mode), decoder.library
    )
    provenance["preprocessing"]["jpeg_scaled_decoding"] = (
        extract.jpeg_scaled_decoding and decoder.name != "nvjpeg"  # nvJPEG always decodes the full size
    )
    provenance["views"] = list(extract.views)
    provenance["versions"] |= codec_versions(find_codec(extract.dtype)) | decoder.versions
    # Rounding depends on the number of threads that share a sum, so it is part of the plan, and all workers use it.
    provenance["threads"] = request.threads or torch.get_num_threads() if device.type == "cpu" else None
    batch_size = choose_batch_size(extract.batch_size, device.type == "cuda")
    return Plan(request.split, extract.shard_size, batch_size, provenance, (image_list,))


def _check_arithmetic(plan: Plan, requested: Plan, folder: Path) -> None:
    started, here = plan.provenance["precision"], requested.provenance["precision"]
    if started != here:
        raise MismatchError(
            f"{folder}: started with precision {started}, but this machine uses {here}",
            f"finish it with --precision {started}, or delete the folder to start over",
        )
    started, here = decoder_of(plan.provenance), decoder_of(requested.provenance)
    if started != here:
        raise MismatchError(
            f"{folder}: started with the JPEG decoder {started}, but this run uses {here}",
            f"finish it with --jpeg-decoder {started}, or delete the folder to start over",
        )
    if changes := _version_changes(plan, requested):
        raise MismatchError(
            f"{folder}: started with other library versions: {changes}",
            "install those versions to finish it, or delete the folder to start over",
        )


def _version_changes(plan: Plan, requested: Plan) -> str:
    """List the library versions that differ: all shards of a store must be computed by the same libraries."""
    stored, here = plan.provenance["versions"], requested.provenance["versions"]
    return ", ".join(
        f"{name}: expected {stored.get(name, 'none')}, got {here.get(name, 'none')}"
        for name in sorted({*stored, *here})
        if stored.get(name) != here.get(name)
    )
