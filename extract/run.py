"""The extraction pipeline: read ‖ encode ‖ write, three stages with bounded queues between them.

A pool of threads decodes images some batches ahead; this thread encodes; one thread writes, checks and names
the shards. Memory holds a few batches, however many images there are.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.annotations import ImageRecord
from common.config import PipelineConfig, allowed_bad
from common.errors import ExtractionError, MismatchError, StoreError
from common.files import remove_leftovers, sha256_of, write_text
from common.shard import ShardInfo, ShardReader, ShardWriter, UnstorableError, check_format, open_hdf5
from common.store import INDEX_FORMAT, FeatureStore, write_index
from extract.cluster import WHOLE, Share
from extract.encoder import GridEncoder, WeightsIdentity, describe_features, identify_weights
from extract.image import BadImageError, decoder_name, load_square
from extract.plan import Plan, settle_plan

_BATCHES_AHEAD = 3


@dataclass
class Summary:
    """What a run did.

    Attributes:
        images, shards: of the whole store.
        done_before: shards that were there already.
        made: shards that this run made.
        complete: whether the index is written; if not, other workers still have shards to make.
        seconds: this run took, without planning.
        rejects: reason -> count, over the whole store; over this worker's shards if it is not complete.
    """

    images: int
    shards: int
    done_before: int
    made: int = 0
    complete: bool = True
    seconds: float = 0.0
    rejects: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Job:
    """One extraction: where the images are, where the store goes, and its plan."""

    images: Path
    output: Path
    folder: Path
    plan: Plan
    identity: WeightsIdentity


def store_folder(output: Path) -> Path:
    """The folder of the shards beside an index file: features/train.h5 -> features/train."""
    return output.with_suffix("")


def prepare(
    config: PipelineConfig, split: str, records: list[ImageRecord], images: Path, output: Path, download: bool = True
) -> Job:
    """Find the weights (downloading them if `download`) and make the plan, without writing anything else.

    Raises:
        WeightsError: the weights cannot be had.
        UserError: the device is not there.
    """
    extract = config.extract
    identity = identify_weights(extract.encoder, extract.weights, download)
    provenance = describe_features(
        extract.encoder, identity, extract.geometry, extract.precision, extract.device, extract.dtype, decoder_name()
    )
    plan = Plan.make(split, records, extract.shard_size, extract.batch_size, provenance)
    return Job(images, output, store_folder(output), plan, identity)


def settled_plan(config: PipelineConfig, job: Job) -> Plan:
    """The plan on disk, if the job agrees with it; the job's own, which is written, if there is none.

    A complete store stays what it is, whatever precision "auto" means on this machine.

    Raises:
        MismatchError: the store on disk was planned differently.
    """
    as_it_is = config.extract.precision == "auto" and job.output.exists()
    return settle_plan(job.plan, job.folder / "plan.json", any_precision=as_it_is)


def extract_features(config: PipelineConfig, job: Job, share: Share = WHOLE, progress: bool = True) -> Summary:
    """Make the store, or finish it: shards that are there and sound are never made twice.

    With several workers each makes its own share, and whoever finds all shards there at its end writes the index.

    Args:
        config: the resolved configuration.
        job: from `prepare`.
        share: which shards are this worker's; by default all.
        progress: show a progress bar over the images.

    Returns:
        What was done.

    Raises:
        MismatchError: the store on disk was planned differently.
        ExtractionError: more than `data.max_bad` images were bad, or a value that the stored type cannot hold.
        WeightsError: the weights do not fit the encoder.
    """
    plan = settled_plan(config, job)
    if _is_complete(job, plan):
        return _summary(job, plan, plan.shards)
    write_text(job.folder / "config.yaml", config.to_yaml("data", "extract"))
    job.output.unlink(missing_ok=True)  # an index over shards that are gone: its presence would mean complete
    there = {shard: _rejects_of(job.folder / plan.shard_name(shard), plan) for shard in share.of(plan.shards)}
    missing = [shard for shard, rejects in there.items() if rejects is None]
    bad = sum((rejects for rejects in there.values() if rejects is not None), Counter[str]())
    begin = time.perf_counter()
    made = _make_shards(config, job, plan, missing, bad, progress) if missing else {}
    remove_leftovers(job.folder)
    remove_leftovers(job.output.parent)
    still_missing = [s for s in range(plan.shards) if not (job.folder / plan.shard_name(s)).exists()]
    if still_missing:
        done = len(there) - len(missing)
        return Summary(len(plan.images), plan.shards, done, len(made), False, time.perf_counter() - begin, bad)
    names = [plan.shard_name(s) for s in range(plan.shards)]
    infos = [
        made.get(s) or ShardInfo(name, len(plan.rows_of(s)), sha256_of(job.folder / name))
        for s, name in enumerate(names)
    ]
    write_index(job.output, job.folder, infos, plan.split, plan.digest(), plan.provenance)
    summary = _summary(job, plan, plan.shards - len(missing))
    summary.made = len(made)
    summary.seconds = time.perf_counter() - begin
    return summary


def _is_complete(job: Job, plan: Plan) -> bool:
    """Whether the index is there and belongs to this plan, and all its shards are there."""
    if not job.output.exists():
        return False
    with open_hdf5(job.output) as index:
        check_format(index, job.output, INDEX_FORMAT)
        if index.attrs.get("plan") != plan.digest():
            raise MismatchError(
                f"{job.output}: is not the store that {job.folder} plans",
                f"choose another --output, or delete {job.output}",
            )
    return all((job.folder / plan.shard_name(shard)).exists() for shard in range(plan.shards))


def _rejects_of(path: Path, plan: Plan) -> Counter[str] | None:
    """The rejects of a shard by reason, or None if it is not there.

    A file under its final name was checked before it got it, so opening suffices.
    """
    if not path.exists():
        return None
    with ShardReader(path) as shard:
        if shard.attributes.get("plan") != plan.digest():
            raise StoreError(f"{path}: belongs to another plan", f"delete {path} and run the same command again")
        return Counter(shard.rejects.values())


def _summary(job: Job, plan: Plan, done_before: int) -> Summary:
    with FeatureStore(job.output) as store:
        return Summary(len(plan.images), plan.shards, done_before, rejects=Counter(store.rejects().values()))


@dataclass(frozen=True)
class _Batch:
    """Rows `start` to `stop` of the store, all in one shard."""

    shard: int
    start: int
    stop: int


def _batches(plan: Plan, shards: list[int]) -> Iterator[_Batch]:
    for shard in shards:
        rows = plan.rows_of(shard)
        for start in range(rows.start, rows.stop, plan.batch_size):
            yield _Batch(shard, start, min(rows.stop, start + plan.batch_size))


def _make_shards(
    config: PipelineConfig, job: Job, plan: Plan, shards: list[int], bad: Counter[str], progress: bool
) -> dict[int, ShardInfo]:
    begun, here = plan.provenance["precision"], job.plan.provenance["precision"]
    if begun != here:
        raise MismatchError(
            f"{job.folder}: begun in {begun}, and auto means {here} on this machine",
            f"finish it with --precision {begun}, or delete the folder to begin again",
        )
    if differing := _version_changes(plan, job.plan):
        raise MismatchError(
            f"{job.folder}: begun with other library versions: {differing}",
            "install those versions to finish it, or delete the folder to begin again",
        )
    extract = config.extract
    limit = allowed_bad(config.data.max_bad, len(plan.images))
    if bad.total() > limit:
        raise _too_many(job, bad, config.data.max_bad, None)
    encoder = GridEncoder(extract.encoder, job.identity, extract.precision, extract.device, extract.dtype)
    total = len(plan.images)
    todo = sum(len(plan.rows_of(s)) for s in shards)
    shard_store = _ShardStore(job.folder, plan)
    readers = ThreadPoolExecutor(extract.readers, "read")
    writer = ThreadPoolExecutor(1, "write")
    bar = tqdm(total=total, initial=total - todo, unit="image", desc=plan.split, disable=not progress)
    try:
        writes: deque[Future[None]] = deque()
        for batch, images, rejects in _read_ahead(job, plan, shards, extract.geometry, encoder.side, readers):
            bad.update(rejects.values())
            if bad.total() > limit:
                raise _too_many(job, bad, config.data.max_bad, next((plan.images[row][1] for row in rejects), None))
            grids = encoder.encode(images)
            writes.append(writer.submit(shard_store.write, batch, grids, rejects))
            while len(writes) > _BATCHES_AHEAD:
                writes.popleft().result()
            bar.update(len(images))
        while writes:
            writes.popleft().result()
    except UnstorableError as error:
        raise ExtractionError(str(error), "store float32 instead: --dtype float32, into another --output") from error
    finally:
        bar.close()
        readers.shutdown(cancel_futures=True)
        writer.shutdown(cancel_futures=True)
        shard_store.abandon()
    return shard_store.finished


def _too_many(job: Job, bad: Counter[str], max_bad: str, example: str | None) -> ExtractionError:
    worst = ", ".join(f"{count} x {why}" for why, count in bad.most_common(3))
    shown = f" ({job.images / example})" if example else ""
    return ExtractionError(
        f"{job.images}: {bad.total()} of {len(job.plan.images)} images are bad, more than {max_bad}: {worst}{shown}",
        "check the image folder, or allow more with --max-bad 50%",
    )


class _ShardStore:
    """The write stage: takes batches in order and turns them into finished shards."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        self._digest = plan.digest()
        self._open: ShardWriter | None = None
        self._failed = False
        self.finished: dict[int, ShardInfo] = {}

    def write(self, batch: _Batch, grids: np.ndarray, rejects: dict[int, str]) -> None:
        """Write one batch; the last of a shard finishes it. After a failure nothing more is written."""
        if self._failed:
            return
        try:
            self._write(batch, grids, rejects)
        except BaseException:
            self._failed = True
            self.abandon()
            raise

    def _write(self, batch: _Batch, grids: np.ndarray, rejects: dict[int, str]) -> None:
        rows = self._plan.rows_of(batch.shard)
        if self._open is None:
            images = self._plan.images[rows.start : rows.stop]
            provenance = self._plan.provenance
            self._open = ShardWriter(
                self._folder / self._plan.shard_name(batch.shard), [i for i, _ in images], [n for _, n in images],
                provenance["grid_shape"], provenance["dtype"],
                {"index": batch.shard, "split": self._plan.split, "plan": self._digest, "provenance": provenance},
            )  # fmt: skip
        local = {row - rows.start: why for row, why in rejects.items()}
        self._open.write(batch.start - rows.start, grids, local)
        if batch.stop == rows.stop:
            self.finished[batch.shard] = self._open.finish()
            self._open = None

    def abandon(self) -> None:
        """Remove an unfinished shard's temporary file."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def _read_ahead(
    job: Job, plan: Plan, shards: list[int], geometry: str, side: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[_Batch, np.ndarray, dict[int, str]]]:
    """Decoded batches in order, with the reasons of refused rows (whose image is all zero), read some ahead."""

    def load(row: int) -> np.ndarray | str:
        try:
            return load_square(job.images / plan.images[row][1], side, geometry)
        except BadImageError as error:
            return str(error)

    ahead: deque[tuple[_Batch, list[Future[np.ndarray | str]]]] = deque()

    def collect() -> tuple[_Batch, np.ndarray, dict[int, str]]:
        batch, futures = ahead.popleft()
        images = np.zeros((len(futures), side, side, 3), np.uint8)
        rejects: dict[int, str] = {}
        for i, future in enumerate(futures):
            loaded = future.result()
            if isinstance(loaded, str):
                rejects[batch.start + i] = loaded
            else:
                images[i] = loaded
        return batch, images, rejects

    for batch in _batches(plan, shards):
        ahead.append((batch, [pool.submit(load, row) for row in range(batch.start, batch.stop)]))
        if len(ahead) > _BATCHES_AHEAD:
            yield collect()
    while ahead:
        yield collect()


def _version_changes(kept: Plan, wanted: Plan) -> str:
    """Library versions that differ: two halves of one store must come from the same libraries."""
    old, new = kept.provenance["versions"], wanted.provenance["versions"]
    return ", ".join(
        f"{k} {old.get(k)} there, {new.get(k)} here" for k in sorted({*old, *new}) if old.get(k) != new.get(k)
    )
