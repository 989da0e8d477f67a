"""COCO as the captioning field uses it: which archives there are, what of them is wanted, and where it goes.

<to>/train2014/COCO_train2014_000000000009.jpg ...
<to>/annotations/captions_train2014.json, dataset_coco.json
"""

from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gridcap.common.download import Remote, fetch
from gridcap.common.errors import DownloadError, UserError
from gridcap.common.files import temporary_file
from gridcap.common.progress import progress_bar

OFFICIAL = "http://images.cocodataset.org"  # its https has another host's certificate; checksums serve instead
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent"
_SPARE = 1.02  # of disk space: file systems round up


@dataclass(frozen=True)
class Archive:
    """A zip file.

    Attributes:
        place: below the server's address.
        size, checksum: as for `Remote`.
        wanted: start of the members' names that are unpacked.
        folder: where they go below <to>, if not where the archive says.
        files: how many of them there are.
        unpacked: their bytes, about.
        server: the address, without --mirror.
    """

    place: str
    size: int
    checksum: str
    wanted: tuple[str, ...]
    files: int
    unpacked: int
    folder: str = ""
    server: str = OFFICIAL

    @property
    def name(self) -> str:
        """Of the zip file."""
        return PurePosixPath(self.place).name

    def remote(self, mirror: str | None) -> Remote:
        """Where to fetch it."""
        return Remote(f"{(mirror or self.server).rstrip('/')}/{self.place}", self.size, self.checksum)

    def is_there(self, to: Path) -> bool:
        """Whether all its files are unpacked."""
        counts = [self._count(to, start) for start in self.wanted]
        return all(counts) and sum(counts) >= self.files

    def _count(self, to: Path, start: str) -> int:
        path = to / self.folder / start
        if start.endswith("/"):
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


def choose(year: str, splits: tuple[str, ...], annotations_only: bool, karpathy: bool) -> list[Archive]:
    """The archives that hold what is asked for, the small ones first.

    Raises:
        UserError: Karpathy's splits of another year than 2014.
    """
    if karpathy and year != "2014":
        raise UserError("--karpathy: Karpathy's splits are of COCO 2014", "leave out --year, or say --year 2014")
    images = [] if annotations_only else [IMAGES[year, split] for split in splits]
    return [ANNOTATIONS[year], *([KARPATHY_SPLITS] if karpathy else []), *images]


def space_needed(archives: list[Archive], to: Path, keep: bool) -> int:
    """The bytes of disk that fetching and unpacking will take at most."""
    missing = [archive for archive in archives if not archive.is_there(to)]
    zips = [archive.size - _fetched(archive, to) for archive in missing]
    return int(_SPARE * (sum(a.unpacked for a in missing) + (sum(zips) if keep else max(zips, default=0))))


def _fetched(archive: Archive, to: Path) -> int:
    """The bytes of an archive that are on the disk already."""
    sizes = [p.stat().st_size for p in (to / archive.name, to / f"{archive.name}.part") if p.exists()]
    return min(archive.size, sum(sizes))


def check_space(archives: list[Archive], to: Path, keep: bool) -> None:
    """Make sure that all of it has room.

    Raises:
        DownloadError: it has not.
    """
    folder = next(path for path in (to, *to.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, space_needed(archives, to, keep)
    if needed > free:
        raise DownloadError(
            f"{to}: needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "free some space, choose another --to, or take less: --splits val, --annotations-only",
        )


def download(archive: Archive, to: Path, mirror: str | None, keep: bool) -> int:
    """Fetch an archive and unpack what is wanted of it; a call that was stopped is gone on with.

    Returns:
        How many files were unpacked; 0 if all were there.

    Raises:
        DownloadError: as for `fetch`, or the archive lacks a file.
    """
    if archive.is_there(to):
        return 0
    path = to / archive.name
    fetch(archive.remote(mirror), path)
    count = _unpack(archive, path, to)
    if not archive.is_there(to):
        raise DownloadError(
            f"{path}: holds {count} of the {archive.files} files that it should", "delete it, and run the command again"
        )
    if not keep:
        path.unlink()
    return count


def _unpack(archive: Archive, path: Path, to: Path) -> int:
    try:
        with zipfile.ZipFile(path) as opened:
            members = [m for m in opened.infolist() if m.filename.startswith(archive.wanted) and not m.is_dir()]
            for member in progress_bar(members, unit="file", desc=f"unpacking {archive.name}"):
                if ".." in PurePosixPath(member.filename).parts:
                    raise DownloadError(f"{path}: its member {member.filename!r} lies outside", "check --mirror")
                target = to / archive.folder / member.filename
                if target.is_file() and target.stat().st_size == member.file_size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary_file(target) as temporary:  # without fsync for each: the count is checked at the end
                    with opened.open(member) as source, open(temporary, "wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
                    os.replace(temporary, target)
            return len(members)
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{path}: a damaged zip file: {error}", "delete it, and run the command again") from error
