import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gridcap.common.captions.records import ImageRecord
from gridcap.common.errors import MismatchError, StoreError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter
from gridcap.train.data.batch import pad_captions
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.order import EpochOrder
from gridcap.train.data.stream import CaptionStream, StreamOptions, sample_captions, sample_views
from gridcap.train.data.vocabulary import BOS, EOS, PAD, Vocabulary
from gridcap.train.engine.distributed import Ranks

COUNT = 23
NUMBERS = st.integers(0, 2**31)


def captions_of(i: int) -> tuple[str, ...]:
    """Return one to four captions that are unique to the image."""
    return tuple(f"image{i} text{k}" + " more" * (i % 3) for k in range(1 + i % 4))


@pytest.fixture(scope="module")
def data(tmp_path_factory, new_store):
    grids = np.random.default_rng(0).normal(size=(COUNT, 2, 2, 8)).astype(np.float16)
    store = new_store(tmp_path_factory.mktemp("stream") / "s.h5", grids, [1000 + i for i in range(COUNT)])
    records = [ImageRecord(1000 + i, f"{1000 + i}.jpg", captions_of(i)) for i in reversed(range(COUNT))]
    return CaptionedImages.join(store, records, Path("captions.json"))


@pytest.fixture(scope="module")
def vocabulary(data):
    return Vocabulary.build([text for image in data.captions for text in image], None)


@pytest.fixture
def stream(data, vocabulary):
    return CaptionStream(data, vocabulary, StreamOptions(batch_size=4, captions_per_image=2, max_length=10, seed=5))


@pytest.fixture(scope="module")
def two_views(tmp_path_factory):
    """17 images with 1 to 4 captions in a store with mirrored grids, and their vocabulary."""
    count, path = 17, tmp_path_factory.mktemp("views") / "s.h5"
    grids = np.random.default_rng(1).normal(size=(count, 2, 2, 3)).astype("f2")
    provenance = {"grid_shape": [2, 2, 3], "dtype": "float16", "views": ["original", "hflip"]}
    names = [f"{i}.jpg" for i in range(count)]
    spec = ShardSpec(list(enumerate(names)), GridLayout.from_provenance(provenance), provenance)
    with ShardWriter(path, spec) as writer:
        writer.write(0, grids.copy(), {})
        writer.write(0, -grids, {}, "hflip")
        writer.finish()
    records = [ImageRecord(i, names[i], captions_of(i)) for i in range(count)]
    data = CaptionedImages.join(FeatureStore(path), records, Path("captions"))
    return data, Vocabulary.build([text for image in data.captions for text in image], None)


def test_flipped_bit_in_a_grid_raises(tmp_path, new_data, vocabulary):
    data = new_data(tmp_path / "flipped.h5", 12)
    shard = data.store.shard_paths[1]
    with h5py.File(shard) as file:
        place = file["features"].id.get_offset() + 2 * file["features"][0].nbytes + 5
    content = bytearray(shard.read_bytes())
    content[place] ^= 0x10
    with open(shard, "r+b") as file:  # in place, as on a failing disk
        file.write(content)
    stream = CaptionStream(data, vocabulary, StreamOptions(batch_size=4, captions_per_image=2, max_length=10))
    with pytest.raises(StoreError, match=f"{shard.name}: row 2 is corrupted"):
        list(stream.epoch(0))


def texts_of(batch, vocabulary):
    """Return the captions of each image of the batch, without padding rows."""
    return [[vocabulary.decode(row.tolist()) for row in image if row.any()] for image in batch.tokens]


# --- sampling of captions ---


@given(st.integers(1, 12), st.integers(1, 12), NUMBERS, NUMBERS, NUMBERS)
def test_captions_are_sampled_without_replacement(available, count, seed, epoch, row):
    chosen = sample_captions(available, count, seed, epoch, row)
    assert len(chosen) == len(set(chosen)) == min(available, count)
    assert set(chosen) <= set(range(available))
    assert chosen == sample_captions(available, count, seed, epoch, row)


def test_sampled_captions_depend_on_seed_epoch_and_row():
    several = {
        "epoch": {tuple(sample_captions(30, 5, 0, epoch, 0)) for epoch in range(8)},
        "seed": {tuple(sample_captions(30, 5, seed, 0, 0)) for seed in range(8)},
        "row": {tuple(sample_captions(30, 5, 0, 0, row)) for row in range(8)},
    }
    assert {name: len(choices) for name, choices in several.items()} == {"epoch": 8, "seed": 8, "row": 8}


def test_every_caption_is_sampled_in_some_epoch():
    assert {i for epoch in range(60) for i in sample_captions(7, 2, 0, epoch, 3)} == set(range(7))


def test_pad_captions_pads_short_and_missing_captions():
    tokens = pad_captions([[[BOS, 7, EOS], [BOS, EOS]], [[BOS, 8, 9, EOS]]], captions_per_image=3)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [[BOS, 7, EOS, PAD], [BOS, EOS, PAD, PAD], [PAD] * 4],
        [[BOS, 8, 9, EOS], [PAD] * 4, [PAD] * 4],
    ]


# --- the stream ---


def test_every_image_occurs_once_per_epoch_with_its_grid_and_captions(data, vocabulary, stream):
    seen = []
    for batch in stream.epoch(3):
        assert batch.grids.dtype == torch.float16
        for image, grid, texts in zip(batch.images, batch.grids, texts_of(batch, vocabulary), strict=True):
            seen.append(int(image))
            stored = data.store[data.store.row_of_image(1000 + int(image))]
            assert np.array_equal(grid.numpy(), stored.reshape(4, 8))
            assert len(texts) == min(2, len(captions_of(image)))
            assert len(set(texts)) == len(texts)
            assert set(texts) <= set(captions_of(image))
    assert seen == EpochOrder(COUNT, 5, 3)[0:COUNT].tolist()


def test_length_includes_the_short_last_batch(stream):
    sizes = [len(batch.images) for batch in stream.epoch(0)]
    assert sizes == [4, 4, 4, 4, 4, 3]
    assert len(stream) == 6


def test_missing_captions_are_rows_of_padding(stream):
    for batch in stream.epoch(0):
        assert batch.tokens.shape[:2] == (len(batch.images), 2)
        for image, rows in zip(batch.images, batch.tokens, strict=True):
            filled = [bool((row != PAD).any()) for row in rows]
            assert filled == ([True, False] if len(captions_of(image)) == 1 else [True, True])


def test_tokens_are_bos_words_eos_padding(stream):
    for batch in stream.epoch(0):
        assert (batch.tokens[..., -1] != PAD).any(), "no column of padding only"
        for row in batch.tokens.flatten(0, 1).tolist():
            if any(row):
                end = row.index(EOS)
                assert row[0] == BOS
                assert PAD not in row[:end]
                assert set(row[end + 1 :]) <= {PAD}


def test_target_index_selects_non_padding_targets(stream):
    for batch in [*stream.epoch(0), *stream.in_order()]:
        targets = batch.tokens[..., 1:].flatten().tolist()
        assert batch.target_index.dtype == torch.int64
        assert batch.target_index.tolist() == [i for i, token in enumerate(targets) if token != PAD]
        assert torch.equal(batch.to(torch.device("cpu")).target_index, batch.target_index)


def test_captions_are_cut_at_max_length(data, vocabulary):
    stream = CaptionStream(data, vocabulary, StreamOptions(batch_size=COUNT, captions_per_image=4, max_length=2))
    (batch,) = stream.epoch(0)
    assert batch.tokens.shape[-1] == 4


def test_epochs_differ_in_captions_and_order_but_are_reproducible(vocabulary, stream):
    def epoch(number):
        return [(batch.images.tolist(), batch.tokens.tolist()) for batch in stream.epoch(number)]

    def chosen(number):
        pairs = ((i, t) for b in stream.epoch(number) for i, t in zip(b.images, texts_of(b, vocabulary), strict=True))
        return {int(i): frozenset(t) for i, t in pairs}

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert chosen(1) != chosen(2)


def test_in_order_yields_first_k_captions_in_store_order(vocabulary, stream):
    batches = list(stream.in_order())
    assert np.concatenate([b.images for b in batches]).tolist() == list(range(COUNT))
    texts = [t for b in batches for t in texts_of(b, vocabulary)]
    assert texts == [list(captions_of(i)[:2]) for i in range(COUNT)]


def test_closing_an_epoch_early_stops_the_thread(data, vocabulary):
    stream = CaptionStream(data, vocabulary, StreamOptions(batch_size=1, captions_per_image=1, max_length=5))
    before = set(threading.enumerate())
    batches = stream.epoch(0)
    next(batches)
    next(batches)
    batches.close()
    assert set(threading.enumerate()) == before


def test_prefetch_is_bounded(data, vocabulary, monkeypatch):
    submitted = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            submitted.append(args)
            return super().submit(*args)

    monkeypatch.setattr("gridcap.train.data.stream.ThreadPoolExecutor", Pool)
    batches = CaptionStream(data, vocabulary, StreamOptions(batch_size=1, captions_per_image=1, max_length=5)).epoch(0)
    for taken in range(1, 6):
        next(batches)
        assert taken < len(submitted) < taken + 6
    batches.close()


def test_finished_epoch_stops_the_thread(stream):
    before = {thread for thread in threading.enumerate() if thread.name.startswith("prefetch")}
    list(stream.epoch(0))
    assert {thread for thread in threading.enumerate() if thread.name.startswith("prefetch")} == before


def test_read_errors_reach_the_consumer(tmp_path, new_store):
    store = new_store(tmp_path / "s.h5", np.ones((12, 2, 2, 8), np.float16), shard_size=12)
    data = CaptionedImages.join(store, [ImageRecord(i, f"{i:03}.jpg", ("x",)) for i in range(12)], Path("c.json"))
    with open(tmp_path / "s" / "00000.h5", "r+b") as file:
        file.truncate(64)
    with pytest.raises(StoreError, match=r"00000\.h5"):
        list(CaptionStream(data, Vocabulary.build(["x"]), StreamOptions(4, 1, 5)).epoch(0))


# --- starting within an epoch ---


def contents(batch):
    return batch.images.tolist(), batch.grids.tolist(), batch.tokens.tolist()


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("steps_per_call", [2, 64])
def test_epoch_from_a_step_equals_the_rest_of_the_epoch(data, vocabulary, shuffle, parts, steps_per_call, monkeypatch):
    monkeypatch.setattr("gridcap.train.data.stream._STEPS_PER_ORDER_CALL", steps_per_call)
    stream = CaptionStream(data, vocabulary, StreamOptions(4, 2, 10, seed=5, shuffle=shuffle, grad_accum_steps=parts))
    every = [contents(batch) for batch in stream.epoch(2)]
    for first in range(len(stream) + 1):
        assert [contents(batch) for batch in stream.epoch(2, first)] == every[first * parts :]


@pytest.mark.parametrize("steps_per_call", [1, 2, 64])
def test_epoch_order_depends_on_seed_and_shuffle(data, vocabulary, steps_per_call, monkeypatch):
    monkeypatch.setattr("gridcap.train.data.stream._STEPS_PER_ORDER_CALL", steps_per_call)
    for shuffle in ("rows", "blocks"):
        stream = CaptionStream(data, vocabulary, StreamOptions(4, 2, 10, seed=8, shuffle=shuffle))
        seen = np.concatenate([batch.images for batch in stream.epoch(6)])
        assert seen.tolist() == EpochOrder(COUNT, 8, 6, shuffle)[0:COUNT].tolist()


# --- ranks and gradient accumulation ---


def with_options(stream, **changes):
    return replace(stream, options=replace(stream.options, **changes))


def split(stream, world, parts, epoch, first=0):
    """Return the batches of all ranks per step, ordered by rank."""
    everywhere = [
        list(with_options(stream, ranks=Ranks(rank, world, rank), grad_accum_steps=parts).epoch(epoch, first))
        for rank in range(world)
    ]
    steps = len(stream) - first
    assert all(len(batches) == steps * parts for batches in everywhere), "all ranks have the same number of batches"
    return [[b for batches in everywhere for b in batches[s * parts : (s + 1) * parts]] for s in range(steps)]


def contents_by_image(batch):
    """Return a mapping from image to its token rows, without padding, and its grid."""
    return {
        int(image): ([[t for t in row if t != PAD] for row in rows.tolist()], grid.tolist())
        for image, rows, grid in zip(batch.images, batch.tokens, batch.grids, strict=True)
    }


@given(st.data(), st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
@hypothesis_settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_and_accumulation_steps_split_each_step_exactly(two_views, data, batch_size, per_image, world, parts):
    """Each image occurs once, with the captions and view of a single-process run."""
    whole_data, vocabulary = two_views
    count = data.draw(st.integers(1, len(whole_data)), label="count")
    subset = replace(whole_data, rows=whole_data.rows[:count], captions=whole_data.captions[:count])
    stream = CaptionStream(subset, vocabulary, StreamOptions(batch_size, per_image, 10, seed=3))
    alone = list(stream.epoch(4))
    shared = split(stream, world, parts, 4)
    assert len(alone) == len(shared) == -(-count // batch_size)
    for step, batches in zip(alone, shared, strict=True):
        assert [i for batch in batches for i in batch.images.tolist()] == step.images.tolist()
        merged = {image: words for batch in batches for image, words in contents_by_image(batch).items()}
        assert merged == contents_by_image(step)
        sizes = [len(batch.images) for batch in batches]
        assert max(sizes) - min(sizes) <= 1, "shares differ by at most one image"


def test_rank_without_images_gets_an_empty_batch(data, vocabulary):
    """23 images in steps of 4: the last step has 3 images for 2 ranks with 3 accumulation steps."""
    stream = CaptionStream(data, vocabulary, StreamOptions(4, 2, 10))
    last = split(stream, 2, 3, 0)[-1]
    assert [len(batch.images) for batch in last] == [1, 1, 1, 0, 0, 0]
    for batch in last[3:]:
        assert batch.images.dtype == np.int64
        assert batch.grids.shape == (0, 4, 8)
        assert batch.grids.dtype == torch.float16
        assert batch.tokens.shape[:2] == (0, 2)
        assert batch.tokens.shape[2] >= 2, "inputs and targets can be sliced"
        assert batch.tokens.dtype == torch.int64
        assert batch.target_index.tolist() == []


def test_empty_batch_of_a_store_with_two_views(two_views):
    data, vocabulary = two_views
    stream = CaptionStream(data, vocabulary, StreamOptions(1, 2, 10))
    assert [len(batch.images) for batch in split(stream, 1, 2, 0, len(data) - 1)[0]] == [1, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_in_order_over_ranks_covers_every_image_once(data, vocabulary, world):
    stream = CaptionStream(data, vocabulary, StreamOptions(4, 2, 10))
    alone = {image: words for batch in stream.in_order() for image, words in contents_by_image(batch).items()}
    shares = [
        (int(image), rank)
        for rank in range(world)
        for batch in with_options(stream, ranks=Ranks(rank, world, 0)).in_order()
        for image in batch.images
    ]
    assert sorted(image for image, _ in shares) == list(range(COUNT))
    assert len({rank for _, rank in shares}) == min(world, len(stream)), "every rank has a share if possible"
    shared = {}
    for rank in range(world):
        for batch in with_options(stream, ranks=Ranks(rank, world, 0)).in_order():
            shared |= contents_by_image(batch)
    assert shared == alone


# --- digest, compared on resume ---


def test_digest_depends_on_rows_and_captions(data):
    digest = data.digest()
    assert digest == replace(data, left_out={"irrelevant": 1}).digest()
    assert len(digest) == 64
    other_rows = data.rows.copy()
    other_rows[3] += 1
    two = [data.captions[1], data.captions[0], *data.captions[2:]]
    turned = [captions[::-1] for captions in data.captions]
    word = [("another caption", *data.captions[0][1:]), *data.captions[1:]]
    moved = [data.captions[0] + data.captions[1][:1], data.captions[1][1:], *data.captions[2:]]
    joined = [(" ".join(captions),) for captions in data.captions]
    others = [
        replace(data, rows=other_rows),
        replace(data, rows=data.rows[:-1], captions=data.captions[:-1]),
        *(replace(data, captions=captions) for captions in (two, turned, word, moved, joined)),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 8


def test_digest_is_stable_across_versions(data):
    """Resuming after an update must recognize the data."""
    few = replace(data, rows=np.array([0, 2], np.int64), captions=[("a cat", "Ä dog"), ("one",)])
    written = few.rows.astype("<i8").tobytes() + b'["a cat", "\\u00c4 dog"]["one"]'
    assert few.digest() == hashlib.sha256(written).hexdigest()


# --- joining a store with captions ---


def test_join_counts_unusable_images_and_keeps_store_order(tmp_path, new_store):
    store = new_store(
        tmp_path / "s.h5", np.ones((10, 2, 2, 8), np.float16), invalid_reasons={3: "truncated", 8: "not an image file"}
    )
    records = [ImageRecord(i, f"folder/{i:03}.jpg", (f"text {i}",)) for i in (9, 8, 3, 2, 0, 77, 78, 79)]
    records += [ImageRecord(i, f"{i:03}.jpg") for i in (4, 5, 6, 7)]
    data = CaptionedImages.join(store, records, Path("c.json"))
    assert data.rows.tolist() == [0, 2, 9]
    assert data.captions == [("text 0",), ("text 2",), ("text 9",)]
    assert len(data) == 3
    assert data.left_out == {"not in the feature store": 3, "invalid in the feature store": 2, "without captions": 4}


def test_id_of_two_different_files_raises_with_both_names(tmp_path, new_store):
    store = new_store(tmp_path / "s.h5", np.ones((3, 2, 2, 8), np.float16))
    records = [ImageRecord(0, "000.jpg", ("fine",)), ImageRecord(1, "COCO_1.jpg", ("another set",))]
    with pytest.raises(MismatchError, match=r"001\.jpg.*COCO_1\.jpg.*captions_x\.json"):
        CaptionedImages.join(store, records, Path("captions_x.json"))


def test_no_image_in_common_raises_with_both_sources(tmp_path, new_store):
    store = new_store(tmp_path / "s.h5", np.ones((3, 2, 2, 8), np.float16), invalid_reasons={0: "truncated"})
    records = [ImageRecord(50, "050.jpg", ("elsewhere",)), ImageRecord(0, "000.jpg", ("x",)), ImageRecord(1, "001.jpg")]
    with pytest.raises(MismatchError, match=r"s\.h5.*captions_x\.json.*in common"):
        CaptionedImages.join(store, records, Path("captions_x.json"))


# --- views ---


def test_views_are_sampled_per_epoch_independently_of_the_batch():
    rows = np.arange(400)
    sampled = [sample_views(2, 7, epoch, rows) for epoch in range(6)]
    for views in sampled:
        assert set(views) == {0, 1}
        assert 140 < views.sum() < 260
    assert len({views.tobytes() for views in sampled}) == 6
    np.testing.assert_array_equal(sample_views(2, 7, 3, rows[[5, 90]]), sampled[3][[5, 90]])
    assert sample_views(2, 8, 0, rows).tolist() != sampled[0].tolist()


def test_training_uses_the_sampled_view_and_validation_the_original(tmp_path):
    grids = np.arange(12 * 2 * 2 * 3).reshape(12, 2, 2, 3).astype("f2")
    provenance = {"grid_shape": [2, 2, 3], "dtype": "float16", "views": ["original", "hflip"]}
    names = [f"{i}.jpg" for i in range(12)]
    spec = ShardSpec(list(enumerate(names)), GridLayout.from_provenance(provenance), provenance)
    with ShardWriter(tmp_path / "s.h5", spec) as writer:
        writer.write(0, grids.copy(), {})
        writer.write(0, -grids, {}, "hflip")
        writer.finish()
    records = [ImageRecord(i, names[i], ("a cat",)) for i in range(2, 12)]  # so that rows differ from positions
    data = CaptionedImages.join(FeatureStore(tmp_path / "s.h5"), records, Path("captions"))
    stream = CaptionStream(data, Vocabulary.build(["a cat"]), StreamOptions(5, 1, 10, seed=3))
    for epoch in range(3):
        for batch in stream.epoch(epoch):
            rows = data.rows[batch.images]
            signs = 1 - 2 * sample_views(2, 3, epoch, rows)
            expected = (grids[rows] * signs[:, None, None, None]).reshape(len(rows), 4, 3)
            np.testing.assert_array_equal(batch.grids.numpy(), expected)
    np.testing.assert_array_equal(
        np.concatenate([b.grids.numpy() for b in stream.in_order()]).ravel(), grids[2:].ravel()
    )
