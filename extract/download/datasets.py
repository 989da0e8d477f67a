"""The datasets that `gridcap download` knows: where their files are, their terms, and their splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gridcap.common.errors import UserError
from gridcap.extract.download.archives import Archive

COCO_SERVER = (
    "http://images.cocodataset.org"  # no https: its certificate is for another host; checksums protect instead
)
KARPATHY_ZIP = (
    "https://cs.stanford.edu/people/karpathy/deepimagesent",
    "caption_datasets.zip",
    36_745_453,
    "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
)
COCO_IMAGES = {
    ("2014", "train"): (13_510_573_713, "md5:0da8c0bd3d6becc4dcb32757491aca88", 82_783, 13_500_000_000),
    ("2014", "val"): (6_645_013_297, "md5:a3d79f5ed8d289b7a7554ce06a5782b3", 40_504, 6_640_000_000),
    ("2017", "train"): (19_336_861_798, "md5:cced6f7f71b7629ddf16f17bbcfab6b2", 118_287, 19_300_000_000),
    ("2017", "val"): (815_585_330, "md5:442b8da7639aecaf257c1dceb8ba8c80", 5_000, 815_000_000),
}
COCO_ANNOTATIONS = {
    "2014": (252_872_794, "md5:0a379cfc70b0e71301e0f377548639bd"),
    "2017": (252_907_541, "md5:f4bbac642086de4f52a3fdda2de5fa2c"),
}
COCO_TERMS = (
    "annotations: CC BY 4.0; the photos belong to their authors under Flickr's terms (cocodataset.org/#termsofuse)"
)
FLICKR_TERMS = "for non-commercial research and education only; the photos belong to their authors under Flickr's terms"
NOCAPS_TERMS = "annotations and photos: CC BY 2.0 (nocaps.org, Open Images)"


@dataclass(frozen=True)
class SplitFiles:
    """Files of a split in the folder of its dataset.

    Attributes:
        images: folder of the images.
        annotations: captions file.
        limit, skip: subset, as in the configuration.
    """

    images: str
    annotations: str
    limit: int | None = None
    skip: int = 0


@dataclass(frozen=True)
class Dataset:
    """Files and splits of a dataset.

    Attributes:
        name: name of the dataset; the default folder is data/<name>.
        terms: license and terms of use.
        annotations: archives with the captions files.
        annotation_files: captions files that are not in an archive: file name -> address.
        images: archives with the images; empty if the images are downloaded one by one.
        splits: name -> files.
        image_server: address of the images in files without URLs; None if the captions files contain the URLs.
    """

    name: str
    terms: str
    annotations: tuple[Archive, ...] = ()
    annotation_files: Mapping[str, str] = field(default_factory=dict)
    images: tuple[Archive, ...] = ()
    splits: Mapping[str, SplitFiles] = field(default_factory=dict)
    image_server: str | None = None


def coco(year: str, parts: tuple[str, ...], karpathy: bool, limit: int | None) -> Dataset:
    """Return COCO 2014 or 2017.

    Args:
        year: release.
        parts: "train", "val", or both.
        karpathy: whether to add Karpathy's splits of COCO 2014.
        limit: use random subsets: this many training images, and a fifth of it for each of val and test.

    Raises:
        UserError: Karpathy's splits were requested for another release, or without one of its parts.
    """
    if karpathy and (year != "2014" or set(parts) != {"train", "val"}):
        raise UserError("--karpathy: Karpathy's splits are for all images of COCO 2014", "omit --year and --splits")
    archive = f"annotations_trainval{year}.zip"
    captions = {part: f"annotations/captions_{part}{year}.json" for part in ("train", "val")}
    size, checksum = COCO_ANNOTATIONS[year]
    annotations = [
        Archive(COCO_SERVER, f"annotations/{archive}", size, checksum, tuple(captions.values()), 2, 100_000_000)
    ]
    if karpathy:
        annotations.append(_karpathy("coco", "annotations", 150_000_000))
    images = tuple(
        Archive(COCO_SERVER, f"zips/{part}{year}.zip", size, checksum, (f"{part}{year}/",), files, unpacked)
        for part in parts
        for size, checksum, files, unpacked in [COCO_IMAGES[year, part]]
    )
    held_out = 5_000 if year == "2014" else 2_500
    if limit is not None:
        held_out = max(1, limit // 5)
    splits: dict[str, SplitFiles] = {}
    if karpathy:
        for split, count in (("train", limit), ("val", limit and held_out), ("test", limit and held_out)):
            splits[f"karpathy-{split}"] = SplitFiles("", "annotations/dataset_coco.json", count)
    elif "train" in parts:
        splits["train"] = SplitFiles(f"train{year}", captions["train"], limit)
    if "val" in parts and not karpathy:
        splits["val"] = SplitFiles(f"val{year}", captions["val"], held_out)
        splits["test"] = SplitFiles(f"val{year}", captions["val"], held_out, skip=held_out)
    server = COCO_SERVER if karpathy else None
    return Dataset("coco", COCO_TERMS, tuple(annotations), {}, () if limit else images, splits, server)


def _flickr8k() -> Dataset:
    """Return Flickr8k with Karpathy's splits (6,000 / 1,000 / 1,000 images)."""
    images = Archive(
        "https://github.com/jbrownlee/Datasets/releases/download",
        "Flickr8k/Flickr8k_Dataset.zip",
        1_115_419_746,
        "md5:f18a1e2920de5bd84dae7cf08ec78978",
        ("Flicker8k_Dataset/",),  # as spelled in the archive
        8_091,
        1_120_000_000,
    )
    splits = {name: SplitFiles("Flicker8k_Dataset", "dataset_flickr8k.json") for name in ("train", "val", "test")}
    return Dataset("flickr8k", FLICKR_TERMS, (_karpathy("flickr8k", "", 15_000_000),), {}, (images,), splits)


def _flickr30k() -> Dataset:
    """Return Flickr30k with Karpathy's splits (29,000 / 1,014 / 1,000 images)."""
    images = Archive(
        "https://uofi.app.box.com/shared/static",
        "1cpolrtkckn4hxr1zhmfg0ln9veo6jpl.gz",
        None,
        "md5:985ac761bbb52ca49e0c474ae806c07c",
        ("flickr30k-images/",),
        31_783,
        4_500_000_000,
    )
    splits = {name: SplitFiles("flickr30k-images", "dataset_flickr30k.json") for name in ("train", "val", "test")}
    return Dataset("flickr30k", FLICKR_TERMS, (_karpathy("flickr30k", "", 40_000_000),), {}, (images,), splits)


def _nocaps() -> Dataset:
    """Return the validation split of nocaps (4,500 images, 10 captions each)."""
    file = "nocaps_val_4500_captions.json"
    url = f"https://nocaps.s3.amazonaws.com/{file}"
    return Dataset("nocaps", NOCAPS_TERMS, annotation_files={file: url}, splits={"val": SplitFiles("images", file)})


def _karpathy(dataset: str, folder: str, unpacked: int) -> Archive:
    """Return the archive of Karpathy's splits, of which one file is unpacked."""
    return Archive(*KARPATHY_ZIP, (f"dataset_{dataset}.json",), 1, unpacked, folder)


OTHERS = {"flickr8k": _flickr8k, "flickr30k": _flickr30k, "nocaps": _nocaps}
NAMES = ("coco", *OTHERS)
