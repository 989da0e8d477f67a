"""The archives of COCO 2014 and 2017, and of Karpathy's splits: download and unpacking.

<output>/train2014/COCO_train2014_000000000009.jpg ...
<output>/annotations/captions_train2014.json, dataset_coco.json
"""

from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gridcap.common.download import Remote, exclusive_lock, fetch
from gridcap.common.errors import DownloadError, UserError
from gridcap.common.files import temporary_file
from gridcap.common.progress import progress_bar
from gridcap.common.text import plural

OFFICIAL = "http://images.cocodataset.org"  # no https: its certificate is for another host; checksums protect instead
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent"
SPACE_FACTOR = 1.02  # file systems round file sizes up


@dataclass(frozen=True)
class Archive:
    """A zip file.

    Attributes:
        path: path on the server.
        size, checksum: as for `Remote`.
        prefixes: prefixes of the members to unpack: folders (ending in "/") or files.
        files: number of these members.
        unpacked: their approximate total size in bytes.
        folder: subfolder of <output> to unpack into.
        server: address of the server.
    """

    path: str
    size: int
    checksum: str
    prefixes: tuple[str, ...]
    files: int
    unpacked: int
    folder: str = ""
    server: str = OFFICIAL

    @property
    def name(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.path).name

    def remote(self, mirror: str | None) -> Remote:
        """Return the file to download, from a mirror or the official server."""
        return Remote(f"{(mirror or self.server).rstrip('/')}/{self.path}", self.size, self.checksum)

    def is_unpacked(self, to: Path) -> bool:
        """Return whether all members have been unpacked."""
        counts = [self._count(to, prefix) for prefix in self.prefixes]
        return all(counts) and sum(counts) >= self.files

    def _count(self, to: Path, prefix: str) -> int:
        path = to / self.folder / prefix
        if prefix.endswith("/"):
            return sum(entry.name.endswith(".jpg") for entry in os.scandir(path)) if path.is_dir() else 0
        return int(path.is_file())


IMAGES = {
    ("2014", "train"): Archive(
        "zips/train2014.zip",
        13_510_573_713,
        "md5:0da8c0bd3d6becc4dcb32757491aca88",
        ("train2014/",),
        82_783,
        13_500_000_000,
    ),
    ("2014", "val"): Archive(
        "zips/val2014.zip", 6_645_013_297, "md5:a3d79f5ed8d289b7a7554ce06a5782b3", ("val2014/",), 40_504, 6_640_000_000
    ),
    ("2017", "train"): Archive(
        "zips/train2017.zip",
        19_336_861_798,
        "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
        ("train2017/",),
        118_287,
        19_300_000_000,
    ),
    ("2017", "val"): Archive(
        "zips/val2017.zip", 815_585_330, "md5:442b8da7639aecaf257c1dceb8ba8c80", ("val2017/",), 5_000, 815_000_000
    ),
}
ANNOTATIONS = {
    "2014": Archive(
        "annotations/annotations_trainval2014.zip",
        252_872_794,
        "md5:0a379cfc70b0e71301e0f377548639bd",
        ("annotations/captions_train2014.json", "annotations/captions_val2014.json"),
        2,
        100_000_000,
    ),
    "2017": Archive(
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "md5:f4bbac642086de4f52a3fdda2de5fa2c",
        ("annotations/captions_train2017.json", "annotations/captions_val2017.json"),
        2,
        100_000_000,
    ),
}
KARPATHY_SPLITS = Archive(
    "caption_datasets.zip",
    36_745_453,
    "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
    ("dataset_coco.json",),
    1,
    150_000_000,
    "annotations",
    KARPATHY,
)


def select_archives(year: str, splits: tuple[str, ...], annotations_only: bool, karpathy: bool) -> list[Archive]:
    """Return the requested archives, small ones first.

    Raises:
        UserError: Karpathy's splits were requested for another year than 2014.
    """
    if karpathy and year != "2014":
        raise UserError("--karpathy: Karpathy's splits belong to COCO 2014", "omit --year, or use --year 2014")
    images = [] if annotations_only else [IMAGES[year, split] for split in splits]
    return [ANNOTATIONS[year], *([KARPATHY_SPLITS] if karpathy else []), *images]


def space_needed(archives: list[Archive], to: Path, keep: bool) -> int:
    """Return the maximum disk space in bytes that downloading and unpacking will take."""
    missing = [archive for archive in archives if not archive.is_unpacked(to)]
    zips = [archive.size - _downloaded(archive, to) for archive in missing]
    return int(SPACE_FACTOR * (sum(a.unpacked for a in missing) + (sum(zips) if keep else max(zips, default=0))))


def _downloaded(archive: Archive, to: Path) -> int:
    """Return how many bytes of an archive have been downloaded."""
    sizes = [p.stat().st_size for p in (to / archive.name, to / f"{archive.name}.part") if p.exists()]
    return min(archive.size, sum(sizes))


def check_space(archives: list[Archive], to: Path, keep: bool) -> None:
    """Check that there is enough disk space.

    Raises:
        DownloadError: not enough.
    """
    folder = next(path for path in (to, *to.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, space_needed(archives, to, keep)
    if needed > free:
        raise DownloadError(
            f"{to}: not enough disk space: {needed / 1e9:.1f} GB required, {free / 1e9:.1f} GB free",
            "free some space, choose another --output, or download less: --splits val, --annotations-only",
        )


def download(archive: Archive, to: Path, mirror: str | None, keep: bool) -> int:
    """Download an archive and unpack the requested members. An interrupted call is resumed.

    Args:
        archive: the archive.
        to: destination folder.
        mirror: address of a mirror; None for the official server.
        keep: whether to keep the zip file.

    Returns:
        Number of unpacked files; 0 if all existed.

    Raises:
        DownloadError: as for `fetch`, or a member is missing, or another process is unpacking the archive.
    """
    if archive.is_unpacked(to):
        return 0
    path = to / archive.name
    with exclusive_lock(to / f"{archive.name}.unpack"):
        if archive.is_unpacked(to):  # another process has just finished
            return 0
        fetch(archive.remote(mirror), path)
        count = _unpack(archive, path, to)
        if not archive.is_unpacked(to):
            raise DownloadError(
                f"{path}: contains {count} of the expected {plural(archive.files, 'file')}",
                "delete it, then rerun the command",
            )
        if not keep:
            path.unlink()
        return count


def _unpack(archive: Archive, path: Path, to: Path) -> int:
    try:
        with zipfile.ZipFile(path) as opened:
            members = [m for m in opened.infolist() if m.filename.startswith(archive.prefixes) and not m.is_dir()]
            for member in progress_bar(members, unit="file", desc=f"unpacking {archive.name}"):
                if ".." in PurePosixPath(member.filename).parts:
                    raise DownloadError(f"{path}: member {member.filename!r} leaves the folder", "check --mirror")
                target = to / archive.folder / member.filename
                if target.is_file() and target.stat().st_size == member.file_size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary_file(target) as temporary:  # no fsync per file: the next run checks the sizes
                    with opened.open(member) as source, open(temporary, "wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
                    os.replace(temporary, target)
            return len(members)
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{path}: corrupted zip file: {error}", "delete it, then rerun the command") from error
