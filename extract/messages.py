"""Messages of extract-features: the plan before the run, and the result after it."""

from __future__ import annotations

from pathlib import Path

import click

from gridcap.common.store.codecs import find_codec
from gridcap.common.text import escape_line, plural
from gridcap.extract.images.decoders import decoder_of
from gridcap.extract.job import Extraction
from gridcap.extract.options import SplitImages
from gridcap.extract.run import survey
from gridcap.extract.summary import Bottleneck, Summary

RANDOM_WEIGHTS_WARNING = (
    "WARNING: random weights. The features carry no information about the photos; they are for the demo and tests. "
    "Use --weights imagenet for real captions."
)


def print_notes(path: Path, source: SplitImages) -> None:
    """Print the problems of the captions file or image folder `path`."""
    for line in source.problems.lines():
        click.echo(f"note: {path}: {line}", err=True)


def print_plan(extraction: Extraction) -> None:
    """Print the plan, the number of complete shards, and the remaining work.

    Raises:
        ExtractionError: the missing shards do not fit on the disk.
    """
    state, plan = survey(extraction), extraction.plan
    click.echo(
        f"plan: {plural(plan.images, 'image')} -> {extraction.output} ({plural(plan.shards, 'shard')} in "
        f"{extraction.folder}), {_describe_features(extraction)}"
    )
    _print_stored_plan(extraction)
    if extraction.resolved.stored is not None:
        click.echo(f"already complete: {len(state.existing)} of {plural(plan.shards, 'shard')}")
    if missing := plan.shards - len(state.existing):
        at_most = "at most " if find_codec(plan.provenance["dtype"]).compressed else ""
        size = f"{at_most}{state.needed / 2**20:,.0f} MiB ({state.free / 2**30:.1f} GiB free)"
        click.echo(f"to write: {plural(missing, 'shard')}, {size}")
    if extraction.identity.random:
        click.secho(RANDOM_WEIGHTS_WARNING, fg="yellow", err=True)


def _describe_features(extraction: Extraction) -> str:
    provenance = extraction.plan.provenance
    parts = [
        f"{provenance['encoder']} {provenance['layer']}",
        f"weights {extraction.identity.name}",
        str(provenance["precision"]),
    ]
    parts += ["compiled"] if provenance["compile"] else []
    parts += [plural(provenance["threads"], "thread")] if provenance["threads"] else []
    parts.append(f"stored as {provenance['dtype']}")
    parts += [f"views {', '.join(provenance['views'])}"] if len(provenance["views"]) > 1 else []
    return ", ".join(parts)


def _print_stored_plan(extraction: Extraction) -> None:
    """Print how the plan on disk differs from the request, and how it changes."""
    resolved, plan, requested = extraction.resolved, extraction.plan, extraction.requested
    if resolved.stored is None:
        return
    if resolved.replaces_stored:
        click.echo("note: replacing a different plan, which has no shards yet", err=True)
        return
    kept = [
        f"{name.replace('_', ' ')} {getattr(plan, name)}"
        for name in ("shard_size", "batch_size")
        if getattr(plan, name) != getattr(requested, name)
    ]
    threads, default_threads = plan.provenance["threads"], requested.provenance["threads"]
    if threads != default_threads:
        kept.append(f"{threads} threads instead of this machine's {default_threads}")
    if kept:
        click.echo(f"note: this store was started with {' and '.join(kept)}, which is kept", err=True)
    if resolved.appended_images:
        click.echo(f"to append: {plural(resolved.appended_images, 'image')} to the existing {resolved.stored.images:,}")


def print_result(extraction: Extraction, summary: Summary, brief: bool = False) -> None:
    """Print the result of a run and the invalid images.

    Args:
        extraction: the extraction.
        summary: result of the run.
        brief: one line only, for one of several processes on this machine.
    """
    shards = f"{plural(summary.written, 'shard')} written ({summary.existing:,} already complete)"
    if brief:
        click.echo(f"share done: {shards}")
        return
    if not summary.complete:
        missing = extraction.plan.shards - len(extraction.plan.existing_shards(extraction.folder))
        click.echo(
            f"share done: {shards}, {summary.seconds:.1f} s; {plural(missing, 'shard')} of other processes "
            f"{'is' if missing == 1 else 'are'} still missing, and the last process to finish writes the index"
        )
    elif summary.written == 0 and summary.seconds == 0:
        size = f"{plural(summary.images, 'image')}, {plural(summary.shards, 'shard')}"
        click.echo(f"nothing to do: {extraction.output} is complete ({size})")
    else:
        shards = f"{plural(summary.written, 'shard')} written ({summary.shards - summary.written:,} already complete)"
        click.echo(f"done: {extraction.output}: {plural(summary.images, 'image')}, {shards}, {summary.seconds:.1f} s")
    if summary.running:
        click.echo(f"  {describe_throughput(summary, extraction)}")
    if summary.retried:
        click.echo(f"retried: {plural(summary.retried, 'image')} valid now")
    _print_invalid(summary)


def describe_throughput(summary: Summary, extraction: Extraction) -> str:
    """Return the throughput and the bottleneck, with the settings that may help."""
    rate = summary.encoded / summary.running
    on_gpu, provenance = summary.gpu_seconds is not None, extraction.plan.provenance
    flags = {
        Bottleneck.DECODING: ["--num-workers", *(["--jpeg-decoder nvjpeg"] if on_gpu else [])],
        Bottleneck.DISK: ["--dtype uint8"],
    }.get(summary.bottleneck, [])
    flags = [flag for flag in flags if flag.split()[-1] not in (provenance["dtype"], decoder_of(provenance))]
    return (
        f"{plural(summary.encoded, 'image')} in {summary.running:.1f} s, {rate:,.{0 if rate >= 100 else 1}f} images/s; "
        f"{'GPU' if on_gpu else 'encoder'} busy {summary.encoder_busy:.0%}; {summary.bottleneck.value}"
        + (f" (see {', '.join(flags)})" if flags else "")
    )


def _print_invalid(summary: Summary) -> None:
    if not summary.invalid:
        return
    click.echo(f"invalid images: {summary.invalid.total():,} (their rows are kept and marked invalid)")
    for reason, count in summary.invalid.most_common():
        names = [escape_line(name) for name in summary.examples.get(reason, [])]
        more = ", ..." if names and count > len(names) else ""
        click.echo(f"  {count:6d}  {escape_line(reason)}" + (f"  ({', '.join(names)}{more})" if names else ""))
