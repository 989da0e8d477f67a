"""Options of extract-features: their values, the combinations that are errors, and the split that they select."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gridcap.common.captions.records import ImageRecord, Problems
from gridcap.common.captions.split import split_images
from gridcap.common.command import reject_ignored
from gridcap.common.config import PipelineConfig, SplitConfig
from gridcap.common.errors import GridcapError, UserError
from gridcap.common.sources.registry import open_source
from gridcap.extract.cluster.share import WHOLE, Share, find_share, local_device, local_rank

SLURM_OPTIONS = ("num_jobs", "partition", "time", "gpus_per_task", "cpus_per_task", "mem", "wait")


@dataclass(frozen=True)
class ExtractOptions:
    """Values of the options that are not configuration keys; see their help texts."""

    split: str | None
    images: Path | None
    annotations: Path | None
    limit: int | None
    skip: int | None
    output: Path | None
    append: bool
    retry_invalid: bool
    allow_invalid: bool
    rank: int | None
    world_size: int | None
    devices: str | None
    submit: str | None
    num_jobs: int | None
    partition: str | None
    time: str | None
    gpus_per_task: int | None
    cpus_per_task: int | None
    mem: str | None
    wait: bool
    brief: bool

    def find_share(self, environ: Mapping[str, str]) -> Share:
        """Return the share of this process and check the options for contradictions.

        Raises:
            UserError: an option contradicts another one or would be ignored.
        """
        if self.submit is None:
            if given := [name for name in SLURM_OPTIONS if getattr(self, name) not in (None, False)]:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise UserError(f"{flags}: only with --submit slurm", f"add --submit slurm, or omit {flags}")
            return find_share(environ, self.rank, self.world_size)
        if self.rank is not None or self.world_size is not None:
            raise UserError("--rank and --world-size: not with --submit", "omit them, and pass --num-jobs")
        if self.num_jobs is None:
            raise UserError("--submit slurm: the number of jobs is missing", "pass --num-jobs")
        if self.retry_invalid:
            raise UserError(
                "--retry-invalid: not with --submit", "run it without --submit: it only reads the invalid images"
            )
        return WHOLE

    def is_quiet(self, environ: Mapping[str, str]) -> bool:
        """Return whether another process of this machine prints the configuration and the plan."""
        return self.brief or bool(local_rank(environ))


def split_name(values: Mapping[str, Any]) -> str | None:
    """Return --split, or a name derived from --output or --images; a new name has no dots, which separate keys."""
    if values["split"]:
        name = str(values["split"])
    elif values["output"] is not None:
        name = values["output"].stem
    elif values["images"] is not None:
        name = _name_of(values["images"])
    else:
        return None
    return name if values["images"] is None else name.replace(".", "-")


def _name_of(images: Path) -> str:
    """Return the name of a folder or archive; for a range or pattern of files, that of their folder."""
    if images.is_dir() or not images.suffix:
        return images.resolve().name
    return images.stem if images.stem.isprintable() and not set(images.stem) & set("*{") else images.parent.name


def split_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration keys that --images sets: the images of --split, or a new split."""
    if values["images"] is None:
        return {}
    key = f"data.splits.{split_name(values)}"
    if values["split"]:
        return {f"{key}.images": values["images"]}
    return {key: {"images": values["images"], "annotations": values["annotations"]}}


@dataclass(frozen=True)
class SplitSelection:
    """The split to extract.

    Attributes:
        config: configuration with this split only.
        name: name of the split.
        split: its images and captions.
        output: index file of the store.
    """

    config: PipelineConfig
    name: str
    split: SplitConfig
    output: Path


def select_split(config: PipelineConfig, options: ExtractOptions) -> SplitSelection:
    """Select the split and check its paths.

    Raises:
        UserError: no such split, an unusable --output, or a --set key that would be ignored.
        PathError: no such image folder.
    """
    name = split_name(vars(options))
    if name is None:
        raise UserError("no images are selected", "pass --split or --images; see extract-features --help")
    _reject_ignored_settings(name, config, options)
    if name not in config.data.splits:
        known = ", ".join(config.data.splits) or "none"
        raise UserError(
            f"--split {name}: no such split in the configuration (known: {known})",
            "pass --images DIR, or add the split to pipeline.yaml",
        )
    given = {key: value for key in ("annotations", "limit", "skip") if (value := getattr(options, key)) is not None}
    split = config.data.splits[name].model_copy(update=given)
    output = options.output or config.data.features_dir / f"{name}.h5"
    if output.suffix != ".h5":
        raise UserError(
            f"--output {output}: the index file must end in .h5", f"use --output {output.with_suffix('.h5')}"
        )
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder, but the index is a file", "choose another --output")
    _check_source(split.images, config.extract.jpeg_decoder)
    data = config.data.model_copy(update={"splits": {name: split}})
    return SplitSelection(config.model_copy(update={"data": data}), name, split, output)


def _check_source(images: Path, jpeg_decoder: str) -> None:
    """Check that the images can be read.

    Raises:
        PathError: there is no such folder or archive.
        UserError: nvJPEG was requested for an archive.
    """
    source = open_source(images)
    if jpeg_decoder == "nvjpeg" and not images.is_dir():
        raise UserError(f"{source}: nvjpeg reads images from folders only", "use --jpeg-decoder pillow, or unpack it")


@dataclass(frozen=True)
class SplitImages:
    """The images of the selected split.

    Attributes:
        records: the images; a folder is listed again on each iteration.
        problems: problems of the captions file or folder; those of a folder are complete after the first iteration.
    """

    records: Iterable[ImageRecord]
    problems: Problems


def load_images(selection: SplitSelection) -> SplitImages:
    """List the images of the selected split.

    Raises:
        AnnotationError: the captions file cannot be used.
    """
    data, seed = selection.config.data, selection.config.seed
    return SplitImages(*split_images(selection.split, selection.name, data, seed))


def _reject_ignored_settings(name: str, config: PipelineConfig, options: ExtractOptions) -> None:
    """Raise UserError if a setting on the command line is about a split or folder that this run does not use."""
    if options.images is not None and options.split is None:
        hint = "use --limit, --skip, and --annotations, or select a split with --split"
        reject_ignored(["data.splits"], "with --images, unless --split selects the split", hint)
    others = [f"data.splits.{other}" for other in config.data.splits if other != name]
    reject_ignored(others, f"on the selected split, {name}", "omit it, or change --split")
    if options.output is not None:
        reject_ignored(["data.features_dir"], "with --output", "omit one of them")


def with_local_device(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration with the GPU of this process if it is one of several on this machine."""
    if local_rank(os.environ) is None:
        return config  # without loading torch to count GPUs
    import torch

    device = local_device(os.environ, config.extract.device, torch.cuda.device_count())
    return config.model_copy(update={"extract": config.extract.model_copy(update={"device": device})})


def repeat_command(without: Collection[str], *more: str) -> list[str]:
    """Return the running command for another process: the options on the command line, except some.

    Args:
        without: names of parameters to omit.
        more: arguments to add.

    Raises:
        GridcapError: the program is not installed.
    """
    program = shutil.which("extract-features", path=f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', '')}")
    if program is None:
        raise GridcapError("extract-features: not found in Python's scripts folder", "install gridcap with pip")
    context = click.get_current_context()
    command = [sys.executable, program]
    for parameter in context.command.params:
        name = parameter.name or ""
        is_given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if name in without or not is_given or not isinstance(parameter, click.Option):
            continue
        values = context.params[name] if parameter.multiple else [context.params[name]]
        for value in values:
            command += [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], str(value)]
    return [*command, *more]
