"""Run an extraction: find out which shards are missing, write this process's share, and write the index at the end."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from dataclasses import dataclass

from gridcap.common.errors import ExtractionError, StoreAccessError, StoreError
from gridcap.common.files import TEMPORARY_SUFFIX, remove_leftovers, write_text
from gridcap.common.store.codecs import find_codec
from gridcap.common.store.shard_format import read_header
from gridcap.common.store.shard_reader import ShardReader
from gridcap.extract.cluster.share import WHOLE, Share
from gridcap.extract.encoding import ViewEncoder
from gridcap.extract.indexing import all_shards_exist, indexed_digest, summarize_store, write_index
from gridcap.extract.job import Extraction
from gridcap.extract.plan import read_plan
from gridcap.extract.retry import retry_invalid
from gridcap.extract.summary import Summary
from gridcap.extract.worker import Worker


@dataclass(frozen=True)
class Survey:
    """Which shards of a store exist and which are missing.

    Attributes:
        existing: existing shards, of all processes.
        missing: missing shards of this process.
        needed: bytes of all missing shards, before compression.
        free: bytes that the disk has for them.
    """

    existing: list[int]
    missing: list[int]
    needed: int
    free: int


def survey(extraction: Extraction, share: Share = WHOLE) -> Survey:
    """List existing and missing shards and check the free disk space.

    Raises:
        ExtractionError: the missing shards do not fit on the disk.
    """
    plan, folder = extraction.plan, extraction.folder
    existing = plan.existing_shards(folder)
    missing = sorted(set(range(plan.shards)).difference(existing))
    codec = find_codec(plan.provenance["dtype"])
    row_bytes = len(plan.provenance["views"]) * codec.row_bytes(tuple(plan.provenance["grid_shape"]))
    sizes = [len(plan.rows_of(shard)) * row_bytes for shard in missing]
    needed = sum(sizes)
    # The compressed size is not known, but a shard is only started if it fits uncompressed.
    required = max(sizes, default=0) if codec.compressed else needed
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    reserved = 0  # space that other processes have reserved for missing shards is not free, but no longer needed either
    for file in folder.rglob(f".*{TEMPORARY_SUFFIX}") if missing else ():
        with contextlib.suppress(FileNotFoundError):  # just renamed
            reserved += file.stat().st_size
    free = shutil.disk_usage(parent).free + reserved
    if required > free:
        subject = "one uncompressed shard needs" if codec.compressed else "the missing shards need"
        smaller = "a smaller --shard-size" if codec.compressed else "--dtype float16-zstd"
        raise ExtractionError(
            f"{folder}: {subject} {required / 2**20:,.0f} MiB, but only {free / 2**20:,.0f} MiB are free",
            f"free some space, or choose another --output, fewer images (--limit), {smaller}, or --dtype uint8",
        )
    own = set(share.of(plan.shards))
    return Survey(existing, [shard for shard in missing if shard in own], needed, free)


def extract_features(
    extraction: Extraction, share: Share = WHOLE, retry: bool = False, show_progress: bool = True
) -> Summary:
    """Create the store or finish it; a complete shard is never computed again.

    Of several processes, each writes its own share of the shards, and the last to finish writes the index.

    Args:
        extraction: as returned by `prepare`.
        share: shards of this process; all by default.
        retry: read invalid images again.
        show_progress: show a progress bar over the images.

    Raises:
        MismatchError: the store on disk was planned differently.
        ExtractionError: more than `data.max_invalid` images are invalid, a value that the dtype cannot store, a read
            error, or not enough disk space.
        OutOfMemoryError: no memory is left.
        WeightsError: the weights do not match the encoder.
    """
    extraction = extraction.save()
    start = time.perf_counter()
    plan, folder = extraction.plan, extraction.folder
    for leftovers in {folder, *(folder / subfolder for subfolder in plan.folders), extraction.output.parent}:
        remove_leftovers(leftovers)
    state = survey(extraction, share)
    digest = indexed_digest(extraction)
    own = [shard for shard in state.existing if shard in share.of(plan.shards)]
    summary = Summary(plan.images, plan.shards, existing=len(own))
    is_complete = len(state.existing) == plan.shards and digest == plan.digest()
    if is_complete and not retry and _summarize_if_consistent(extraction, summary):
        return summary
    if share.rank == 0 or not (folder / "config.yaml").exists():
        write_text(folder / "config.yaml", extraction.config.to_yaml("data", "extract"))
    if digest == plan.digest() and (state.missing or not retry):
        extraction.output.unlink(missing_ok=True)  # its presence would mean that the store is complete
    summary.invalid = sum((_invalid_of(extraction, shard) for shard in own), Counter())
    encoder = ViewEncoder(extraction)
    if state.missing:
        Worker(extraction, encoder, share, summary, show_progress).write_shards(state.missing)
    if retry:
        retry_invalid(extraction, encoder, own, summary, show_progress)
        summary.invalid = sum((_invalid_of(extraction, shard) for shard in share.of(plan.shards)), Counter())
    summary.encoded = encoder.encoded
    # If images were appended in the meantime, the processes that add them write the index.
    is_shared = share.world_size > 1
    summary.complete = all_shards_exist(extraction, is_shared) and read_plan(folder).digest() == plan.digest()
    if summary.complete:
        write_index(extraction, summary, is_shared_retry=retry and is_shared)
    summary.seconds = time.perf_counter() - start
    return summary


def _summarize_if_consistent(extraction: Extraction, summary: Summary) -> bool:
    """Complete the summary from the index; return False if the index does not match its shards.

    Raises:
        StoreAccessError: the system could not read the store.
    """
    try:
        summarize_store(extraction, summary)
    except StoreAccessError:
        raise
    except StoreError:
        return False
    return True


def _invalid_of(extraction: Extraction, shard: int) -> Counter[str]:
    """Count the invalid images of an existing shard by reason; a shard was verified before it got its final name.

    Raises:
        StoreError: the shard belongs to another plan.
    """
    path = extraction.folder / extraction.plan.shard_name(shard)
    info = read_header(path)
    if info is None or info.plan != extraction.plan.digest_of(shard):
        raise StoreError(f"{path}: belongs to another plan", f"delete {path} and rerun the command")
    if not info.invalid:
        return Counter()
    with ShardReader(path) as reader:
        return Counter(reader.invalid_reasons.values())
