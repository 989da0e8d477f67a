"""One extraction from its plan to its index: what is there, what is missing, and whose work it is."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gridcap.common.captions.records import ImageRecord
from gridcap.common.config import PipelineConfig
from gridcap.common.device import choose_batch_size, choose_compile, choose_device
from gridcap.common.errors import ExtractionError, MismatchError, StoreError, UserError
from gridcap.common.files import TEMPORARY_SUFFIX, remove_leftovers, write_text
from gridcap.common.image import decoder_name
from gridcap.common.store.index import INDEX_FORMAT, open_index
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard import ShardReader, read_header, stored_bytes
from gridcap.extract.cluster.share import WHOLE, Share
from gridcap.extract.encoders.grid_encoder import EncoderOptions
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.weights import identify_weights
from gridcap.extract.images.nvjpeg import nvjpeg_name
from gridcap.extract.manifest import Image, ImageList
from gridcap.extract.plan import FILE, Plan, load_or_create_plan, read_plan, store_folder, write_planned_index
from gridcap.extract.worker import Job, Summary, Worker, check_arithmetic

_EXAMPLES = 3
_INDEX_ATTEMPTS = 5


@dataclass(frozen=True)
class _Pairs:
    """What the plan knows of image records; goes through them again each time it is asked."""

    records: Iterable[ImageRecord]

    def __iter__(self) -> Iterator[Image]:
        return ((record.image_id, record.file_name) for record in self.records)


def prepare(
    config: PipelineConfig,
    split: str,
    records: Iterable[ImageRecord],
    images: Path,
    output: Path,
    dry_run: bool = False,
    threads: int | None = None,
) -> Job:
    """Find the weights (downloading them) and make the plan, whose image list is written if there is no plan yet.

    Args:
        config: the resolved configuration.
        split: its name.
        records: the images; gone through more than once, never held.
        images: the folder they are in.
        output: the index file.
        dry_run: download and write nothing.
        threads: to compute with on a CPU; None: as many as torch takes here.

    Raises:
        WeightsError: the weights cannot be had.
        UserError: the device is not there, or a file stands where the shards' folder should be.
    """
    extract, folder, pairs = config.extract, store_folder(output), _Pairs(records)
    identity = identify_weights(extract.encoder, extract.weights, download=not dry_run)
    device = choose_device(extract.device)
    decoder = nvjpeg_name(device) if extract.jpeg_decoder == "nvjpeg" else decoder_name()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, and the shards need a folder of that name", "choose another --output")
    begun = dry_run or (folder / FILE).exists()
    listed = ImageList.make(pairs, extract.shard_size, None if begun else folder)
    compiled = choose_compile(extract.compile, listed.images, device)
    options = EncoderOptions(extract.precision, extract.device, extract.dtype, compiled)
    provenance = describe_features(extract.encoder, identity, options, extract.resize_mode, decoder)
    provenance["views"] = list(extract.views)
    # Sums round by how many threads share them, so the number belongs to the plan, and every worker keeps to it.
    provenance["threads"] = threads or torch.get_num_threads() if device.type == "cpu" else None
    batch_size = choose_batch_size(extract.batch_size, device.type == "cuda")
    plan = Plan(split, extract.shard_size, batch_size, provenance, (listed,))
    return Job(images, pairs, output, folder, plan, identity)


def settled_plan(config: PipelineConfig, job: Job, append: bool = False, write: bool = True) -> Plan:
    """The plan on disk, if the job agrees with it; the job's own, which is written, if there is none.

    What is begun compiled goes on so, whatever --compile auto would mean for it now; and a complete store stays
    what it is, whatever precision "auto" means on this machine.

    Args:
        config, job: what was asked for.
        append: add images that are new to the plan.
        write: what is new.

    Raises:
        MismatchError: the store on disk was planned differently.
    """
    if append and (job.folder / FILE).exists():
        check_arithmetic(job, read_plan(job.folder))  # before the plan is changed
    free = {"compile"} if config.extract.compile == "auto" else set()
    if config.extract.precision == "auto" and job.output.exists() and not append:
        free.add("precision")
    return load_or_create_plan(job.plan, job.records, job.folder, free, append, write)


@dataclass(frozen=True)
class Survey:
    """What there is of a store, and what this worker has to do.

    Attributes:
        there: the shards that are there, of all workers.
        missing: this worker's shards that are not.
        needed: bytes of all shards that are not there.
        free: bytes that the disk has for them.
    """

    there: list[int]
    missing: list[int]
    needed: int
    free: int


def survey(job: Job, plan: Plan, share: Share = WHOLE) -> Survey:
    """Look at what is there.

    Raises:
        ExtractionError: what is missing does not fit on the disk.
    """
    there = plan.existing_shards(job.folder)
    missing = sorted(set(range(plan.shards)).difference(there))
    row = len(plan.provenance["views"]) * stored_bytes(plan.provenance["grid_shape"], plan.provenance["dtype"])
    needed = sum(len(plan.rows_of(shard)) for shard in missing) * row
    existing = next(folder for folder in (job.folder, *job.folder.absolute().parents) if folder.exists())
    begun = 0  # what other workers have set aside is not free, and not needed
    for file in job.folder.rglob(f".*{TEMPORARY_SUFFIX}") if missing else ():
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            begun += file.stat().st_size
    free = shutil.disk_usage(existing).free + begun
    if needed > free:
        raise ExtractionError(
            f"{job.folder}: the features still to make take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            "are free",
            "free some space, choose another --output, fewer images (--limit), or --dtype uint8",
        )
    mine = set(share.of(plan.shards))
    return Survey(there, [shard for shard in missing if shard in mine], needed, free)


def extract_features(
    config: PipelineConfig,
    job: Job,
    share: Share = WHOLE,
    progress: bool = True,
    append: bool = False,
    retry: bool = False,
) -> Summary:
    """Make the store, or finish it: shards that are there and sound are never made twice.

    With several workers each makes its own share, and whoever finds all shards there at its end writes the index.

    Args:
        config: the resolved configuration.
        job: from `prepare`.
        share: which shards are this worker's; by default all.
        progress: show a progress bar over the images.
        append: add images that are new in the list.
        retry: try rejected images again.

    Returns:
        What was done.

    Raises:
        MismatchError: the store on disk was planned differently.
        ExtractionError: more than `data.max_invalid` images were bad, a value that the stored type cannot hold, or
            the store does not fit on the disk.
        WeightsError: the weights do not fit the encoder.
    """
    plan = settled_plan(config, job, append)
    begin = time.perf_counter()
    summary = Summary(plan.images, plan.shards)
    for folder in {job.folder, *(job.folder / part for part in plan.folders), job.output.parent}:
        remove_leftovers(folder)
    found = survey(job, plan, share)
    indexed = _indexed_plan(job, plan)
    if len(found.there) == plan.shards and indexed == plan.digest() and not retry:
        summary.done_before = len(share.of(plan.shards))
        with contextlib.suppress(StoreError):  # an index that does not fit its shards is written anew
            return _whole(job, summary)
    if share.rank == 0 or not (job.folder / "config.yaml").exists():
        write_text(job.folder / "config.yaml", config.to_yaml("data", "extract"))
    if indexed == plan.digest() and (found.missing or not retry):
        # It lists shards that are gone, or another's; and its presence would mean complete.
        job.output.unlink(missing_ok=True)
    mine = [shard for shard in found.there if shard in share.of(plan.shards)]
    summary.done_before = len(mine)
    worker = Worker(config, job, plan, share, summary, progress)
    summary.rejects = sum((_rejects_of(job.folder, plan, shard) for shard in mine), Counter())
    if found.missing:
        worker.make(found.missing)
    if retry:
        worker.retry(mine)
    whole = len(plan.existing_shards(job.folder)) == plan.shards
    # If images were appended meanwhile, the index is for those who make them to write.
    summary.complete = whole and read_plan(job.folder).digest() == plan.digest()
    if summary.complete:
        _index(job, plan, summary, retry and share.world_size > 1)
    summary.seconds = time.perf_counter() - begin
    return summary


def _indexed_plan(job: Job, plan: Plan) -> str | None:
    """The digest of the plan that the index was written for: this one's, or this one's before images were appended.

    Raises:
        MismatchError: that of another store.
    """
    if not job.output.exists():
        return None
    with open_index(job.output, INDEX_FORMAT) as (index, _):
        digest = str(index.attrs.get("plan"))
    if digest not in plan.digests:
        raise MismatchError(
            f"{job.output}: is not the store that {job.folder} plans",
            f"choose another --output, or delete {job.output}",
        )
    return digest


def _rejects_of(folder: Path, plan: Plan, shard: int) -> Counter[str]:
    """The rejects by reason of a shard that is there.

    A file under its final name was checked before it got it, so its header suffices.
    """
    path = folder / plan.shard_name(shard)
    info = read_header(path)
    if info is None or info.plan != plan.digest_of(shard):
        raise StoreError(f"{path}: belongs to another plan", f"delete {path} and run the same command again")
    if not info.rejected:
        return Counter()
    with ShardReader(path) as reader:
        return Counter(reader.rejects.values())


def _index(job: Job, plan: Plan, summary: Summary, others_rewrite: bool) -> None:
    """Write the index, and see that it fits its shards.

    While other workers retry rejected images, shards change under our hands: whoever finds that its index does not
    fit writes it again, and the last one's fits. And a worker that ends at the same time may put its index, of the same
    bytes, in the place of this one's while it is read: then it is read again.
    """
    written = False
    for attempt in range(_INDEX_ATTEMPTS):
        try:
            if others_rewrite or not written:
                write_planned_index(job.output, plan)
                written = True
            _whole(job, summary)
            return
        except StoreError:
            if attempt == _INDEX_ATTEMPTS - 1 and not others_rewrite:
                raise
            time.sleep(random.uniform(0, 0.2 * attempt))
    summary.complete = False


def _whole(job: Job, summary: Summary) -> Summary:
    """The summary of a complete store."""
    with FeatureStore(job.output) as store:
        summary.rejects = Counter(store.rejects.values())
        for row, why in store.rejects.items():
            if len(examples := summary.examples.setdefault(why, [])) < _EXAMPLES:
                examples.append(store.file_names[row])
    return summary
