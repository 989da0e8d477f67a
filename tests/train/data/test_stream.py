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
    """One to four captions that no other image has."""
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


def test_a_flipped_bit_in_a_grid_trains_nothing(tmp_path, new_data, vocabulary):
    data = new_data(tmp_path / "flipped.h5", 12)
    shard = data.store.shard_paths[1]
    with h5py.File(shard) as file:
        place = file["features"].id.get_offset() + 2 * file["features"][0].nbytes + 5
    content = bytearray(shard.read_bytes())
    content[place] ^= 0x10
    with open(shard, "r+b") as file:  # the same file, as a failing disk would have it
        file.write(content)
    stream = CaptionStream(data, vocabulary, StreamOptions(batch_size=4, captions_per_image=2, max_length=10))
    with pytest.raises(StoreError, match=f"{shard.name}: row 2 is corrupted"):
        list(stream.epoch(0))


def texts_of(batch, vocabulary):
    """Per image of the batch, the captions of its rows that hold words."""
    return [[vocabulary.decode(row.tolist()) for row in image if row.any()] for image in batch.tokens]


# --- the choice of captions ---


@given(st.integers(1, 12), st.integers(1, 12), NUMBERS, NUMBERS, NUMBERS)
def test_captions_are_chosen_without_repeats(available, wanted, seed, epoch, row):
    chosen = sample_captions(available, wanted, seed, epoch, row)
    assert len(chosen) == len(set(chosen)) == min(available, wanted)
    assert set(chosen) <= set(range(available))
    assert chosen == sample_captions(available, wanted, seed, epoch, row)


def test_the_choice_of_captions_depends_on_seed_epoch_and_image():
    several = {
        "epoch": {tuple(sample_captions(30, 5, 0, epoch, 0)) for epoch in range(8)},
        "seed": {tuple(sample_captions(30, 5, seed, 0, 0)) for seed in range(8)},
        "row": {tuple(sample_captions(30, 5, 0, 0, row)) for row in range(8)},
    }
    assert {name: len(choices) for name, choices in several.items()} == {"epoch": 8, "seed": 8, "row": 8}


def test_every_caption_is_chosen_in_some_epoch():
    assert {i for epoch in range(60) for i in sample_captions(7, 2, 0, epoch, 3)} == set(range(7))


def test_padding_fills_short_captions_and_absent_ones():
    tokens = pad_captions([[[BOS, 7, EOS], [BOS, EOS]], [[BOS, 8, 9, EOS]]], captions_per_image=3)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [[BOS, 7, EOS, PAD], [BOS, EOS, PAD, PAD], [PAD] * 4],
        [[BOS, 8, 9, EOS], [PAD] * 4, [PAD] * 4],
    ]


# --- the stream ---


def test_every_image_comes_once_an_epoch_with_its_own_grid_and_its_own_captions(data, vocabulary, stream):
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


def test_the_last_batch_is_short_and_the_length_counts_it(stream):
    sizes = [len(batch.images) for batch in stream.epoch(0)]
    assert sizes == [4, 4, 4, 4, 4, 3]
    assert len(stream) == 6


def test_fewer_captions_than_k_leave_rows_of_padding_only(stream):
    for batch in stream.epoch(0):
        assert batch.tokens.shape[:2] == (len(batch.images), 2)
        for image, rows in zip(batch.images, batch.tokens, strict=True):
            filled = [bool((row != PAD).any()) for row in rows]
            assert filled == ([True, False] if len(captions_of(image)) == 1 else [True, True])


def test_each_row_of_tokens_is_framed_and_padded_at_its_end_only(stream):
    for batch in stream.epoch(0):
        assert (batch.tokens[..., -1] != PAD).any(), "no column of padding only"
        for row in batch.tokens.flatten(0, 1).tolist():
            if any(row):
                end = row.index(EOS)
                assert row[0] == BOS
                assert PAD not in row[:end]
                assert set(row[end + 1 :]) <= {PAD}


def test_words_are_the_places_of_what_is_to_be_predicted(stream):
    for batch in [*stream.epoch(0), *stream.in_order()]:
        targets = batch.tokens[..., 1:].flatten().tolist()
        assert batch.target_index.dtype == torch.int64
        assert batch.target_index.tolist() == [place for place, word in enumerate(targets) if word != PAD]
        assert torch.equal(batch.to(torch.device("cpu")).target_index, batch.target_index)


def test_captions_are_cut_to_max_length(data, vocabulary):
    stream = CaptionStream(data, vocabulary, StreamOptions(batch_size=COUNT, captions_per_image=4, max_length=2))
    (batch,) = stream.epoch(0)
    assert batch.tokens.shape[-1] == 4


def test_epochs_choose_other_captions_in_another_order_and_the_same_epoch_the_same(vocabulary, stream):
    def epoch(number):
        return [(batch.images.tolist(), batch.tokens.tolist()) for batch in stream.epoch(number)]

    def chosen(number):
        pairs = ((i, t) for b in stream.epoch(number) for i, t in zip(b.images, texts_of(b, vocabulary), strict=True))
        return {int(i): frozenset(t) for i, t in pairs}

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert chosen(1) != chosen(2)


def test_in_order_gives_the_first_k_captions_in_the_order_of_the_store(vocabulary, stream):
    batches = list(stream.in_order())
    assert np.concatenate([b.images for b in batches]).tolist() == list(range(COUNT))
    texts = [t for b in batches for t in texts_of(b, vocabulary)]
    assert texts == [list(captions_of(i)[:2]) for i in range(COUNT)]


def test_stopping_an_epoch_early_leaves_no_thread(data, vocabulary):
    stream = CaptionStream(data, vocabulary, StreamOptions(batch_size=1, captions_per_image=1, max_length=5))
    before = set(threading.enumerate())
    batches = stream.epoch(0)
    next(batches)
    next(batches)
    batches.close()
    assert set(threading.enumerate()) == before


def test_only_a_few_batches_are_read_ahead(data, vocabulary, monkeypatch):
    asked_for = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            asked_for.append(args)
            return super().submit(*args)

    monkeypatch.setattr("gridcap.train.data.stream.ThreadPoolExecutor", Pool)
    batches = CaptionStream(data, vocabulary, StreamOptions(batch_size=1, captions_per_image=1, max_length=5)).epoch(0)
    for taken in range(1, 6):
        next(batches)
        assert taken < len(asked_for) < taken + 6
    batches.close()


def test_a_finished_epoch_leaves_no_thread(stream):
    before = {thread for thread in threading.enumerate() if thread.name.startswith("prefetch")}
    list(stream.epoch(0))
    assert {thread for thread in threading.enumerate() if thread.name.startswith("prefetch")} == before


def test_a_read_error_reaches_the_one_who_iterates(tmp_path, new_store):
    store = new_store(tmp_path / "s.h5", np.ones((12, 2, 2, 8), np.float16), shard_size=12)
    data = CaptionedImages.join(store, [ImageRecord(i, f"{i:03}.jpg", ("x",)) for i in range(12)], Path("c.json"))
    with open(tmp_path / "s" / "00000.h5", "r+b") as file:
        file.truncate(64)
    with pytest.raises(StoreError, match=r"00000\.h5"):
        list(CaptionStream(data, Vocabulary.build(["x"]), StreamOptions(4, 1, 5)).epoch(0))


# --- from the middle of an epoch ---


def contents(batch):
    return batch.images.tolist(), batch.grids.tolist(), batch.tokens.tolist()


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("at_once", [2, 64])
def test_an_epoch_begun_at_a_step_goes_on_as_the_whole_epoch_does(
    data, vocabulary, shuffle, parts, at_once, monkeypatch
):
    monkeypatch.setattr("gridcap.train.data.stream._STEPS_PER_ORDER_CALL", at_once)
    stream = CaptionStream(data, vocabulary, StreamOptions(4, 2, 10, seed=5, shuffle=shuffle, grad_accum_steps=parts))
    every = [contents(batch) for batch in stream.epoch(2)]
    for first in range(len(stream) + 1):
        assert [contents(batch) for batch in stream.epoch(2, first)] == every[first * parts :]


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_the_order_of_an_epoch_is_the_one_of_the_seed_and_the_shuffle(data, vocabulary, at_once, monkeypatch):
    monkeypatch.setattr("gridcap.train.data.stream._STEPS_PER_ORDER_CALL", at_once)
    for shuffle in ("rows", "blocks"):
        stream = CaptionStream(data, vocabulary, StreamOptions(4, 2, 10, seed=8, shuffle=shuffle))
        seen = np.concatenate([batch.images for batch in stream.epoch(6)])
        assert seen.tolist() == EpochOrder(COUNT, 8, 6, shuffle)[0:COUNT].tolist()


# --- split over processes and parts ---


def with_options(stream, **changes):
    return replace(stream, options=replace(stream.options, **changes))


def split(stream, world, parts, epoch, first=0):
    """Per step, the batches of all processes, in the order of the processes."""
    everywhere = [
        list(with_options(stream, ranks=Ranks(rank, world, rank), grad_accum_steps=parts).epoch(epoch, first))
        for rank in range(world)
    ]
    steps = len(stream) - first
    assert all(len(batches) == steps * parts for batches in everywhere), "the same count of batches everywhere"
    return [[b for batches in everywhere for b in batches[s * parts : (s + 1) * parts]] for s in range(steps)]


def words_of(batch):
    """Image -> its rows of tokens without padding, and its grid."""
    return {
        int(image): ([[t for t in row if t != PAD] for row in rows.tolist()], grid.tolist())
        for image, rows, grid in zip(batch.images, batch.tokens, batch.grids, strict=True)
    }


@given(st.data(), st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
@hypothesis_settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_processes_and_parts_split_each_steps_images_exactly(two_views, drawn, batch_size, per_image, world, parts):
    """Each image once, with the captions and the view that one process alone would show of it."""
    whole_data, vocabulary = two_views
    count = drawn.draw(st.integers(1, len(whole_data)), label="count")
    data = replace(whole_data, rows=whole_data.rows[:count], captions=whole_data.captions[:count])
    stream = CaptionStream(data, vocabulary, StreamOptions(batch_size, per_image, 10, seed=3))
    alone = list(stream.epoch(4))
    shared = split(stream, world, parts, 4)
    assert len(alone) == len(shared) == -(-count // batch_size)
    for step, batches in zip(alone, shared, strict=True):
        assert [i for batch in batches for i in batch.images.tolist()] == step.images.tolist()
        merged = {image: words for batch in batches for image, words in words_of(batch).items()}
        assert merged == words_of(step)
        sizes = [len(batch.images) for batch in batches]
        assert max(sizes) - min(sizes) <= 1, "shares are alike"


def test_a_share_without_images_is_an_empty_batch(data, vocabulary):
    """23 images in steps of 4: the last has 3 for 2 processes of 3 parts."""
    stream = CaptionStream(data, vocabulary, StreamOptions(4, 2, 10))
    last = split(stream, 2, 3, 0)[-1]
    assert [len(batch.images) for batch in last] == [1, 1, 1, 0, 0, 0]
    for batch in last[3:]:
        assert batch.images.dtype == np.int64
        assert batch.grids.shape == (0, 4, 8)
        assert batch.grids.dtype == torch.float16
        assert batch.tokens.shape[:2] == (0, 2)
        assert batch.tokens.shape[2] >= 2, "one may take the last token off"
        assert batch.tokens.dtype == torch.int64
        assert batch.target_index.tolist() == []


def test_an_empty_batch_of_a_store_with_two_views(two_views):
    data, vocabulary = two_views
    stream = CaptionStream(data, vocabulary, StreamOptions(1, 2, 10))
    assert [len(batch.images) for batch in split(stream, 1, 2, 0, len(data) - 1)[0]] == [1, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_in_order_over_processes_covers_every_image_once(data, vocabulary, world):
    stream = CaptionStream(data, vocabulary, StreamOptions(4, 2, 10))
    alone = {image: words for batch in stream.in_order() for image, words in words_of(batch).items()}
    found = [
        (int(image), rank)
        for rank in range(world)
        for batch in with_options(stream, ranks=Ranks(rank, world, 0)).in_order()
        for image in batch.images
    ]
    assert sorted(image for image, _ in found) == list(range(COUNT))
    assert len({rank for _, rank in found}) == min(world, len(stream)), "each has a share, as long as there are batches"
    shared = {}
    for rank in range(world):
        for batch in with_options(stream, ranks=Ranks(rank, world, 0)).in_order():
            shared |= words_of(batch)
    assert shared == alone


# --- the digest: what a resume must find again ---


def test_the_digest_says_which_rows_and_captions_there_are(data):
    digest = data.digest()
    assert digest == replace(data, left_out={"no matter": 1}).digest()
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


def test_the_digest_is_the_same_in_every_version(data):
    """A resume after an update must still know its data."""
    few = replace(data, rows=np.array([0, 2], np.int64), captions=[("a cat", "Ä dog"), ("one",)])
    written = few.rows.astype("<i8").tobytes() + b'["a cat", "\\u00c4 dog"]["one"]'
    assert few.digest() == hashlib.sha256(written).hexdigest()


# --- joining a store with captions ---


def test_join_counts_what_it_leaves_out_and_keeps_the_order_of_the_store(tmp_path, new_store):
    store = new_store(tmp_path / "s.h5", np.ones((10, 2, 2, 8), np.float16), rejects={3: "truncated", 8: "no image"})
    records = [ImageRecord(i, f"folder/{i:03}.jpg", (f"text {i}",)) for i in (9, 8, 3, 2, 0, 77, 78, 79)]
    records += [ImageRecord(i, f"{i:03}.jpg") for i in (4, 5, 6, 7)]
    data = CaptionedImages.join(store, records, Path("c.json"))
    assert data.rows.tolist() == [0, 2, 9]
    assert data.captions == [("text 0",), ("text 2",), ("text 9",)]
    assert len(data) == 3
    assert data.left_out == {"not in the feature store": 3, "invalid in the feature store": 2, "without captions": 4}


def test_an_id_that_means_two_files_is_refused_with_both_names(tmp_path, new_store):
    store = new_store(tmp_path / "s.h5", np.ones((3, 2, 2, 8), np.float16))
    records = [ImageRecord(0, "000.jpg", ("fine",)), ImageRecord(1, "COCO_1.jpg", ("another set",))]
    with pytest.raises(MismatchError, match=r"001\.jpg.*COCO_1\.jpg.*captions_x\.json"):
        CaptionedImages.join(store, records, Path("captions_x.json"))


def test_nothing_in_common_is_refused_with_both_sources(tmp_path, new_store):
    store = new_store(tmp_path / "s.h5", np.ones((3, 2, 2, 8), np.float16), rejects={0: "bad"})
    records = [ImageRecord(50, "050.jpg", ("elsewhere",)), ImageRecord(0, "000.jpg", ("x",)), ImageRecord(1, "001.jpg")]
    with pytest.raises(MismatchError, match=r"s\.h5.*captions_x\.json.*in common"):
        CaptionedImages.join(store, records, Path("captions_x.json"))


# ------------------------------------------------------------------------------------------------------------ views


def test_each_epoch_draws_a_view_of_each_image_whatever_batch_it_is_in():
    rows = np.arange(400)
    drawn = [sample_views(2, 7, epoch, rows) for epoch in range(6)]
    for views in drawn:
        assert set(views) == {0, 1}
        assert 140 < views.sum() < 260
    assert len({views.tobytes() for views in drawn}) == 6
    np.testing.assert_array_equal(sample_views(2, 7, 3, rows[[5, 90]]), drawn[3][[5, 90]])
    assert sample_views(2, 8, 0, rows).tolist() != drawn[0].tolist()


def test_training_sees_the_drawn_view_and_validation_the_original(tmp_path):
    grids = np.arange(12 * 2 * 2 * 3).reshape(12, 2, 2, 3).astype("f2")
    provenance = {"grid_shape": [2, 2, 3], "dtype": "float16", "views": ["original", "hflip"]}
    names = [f"{i}.jpg" for i in range(12)]
    spec = ShardSpec(list(enumerate(names)), GridLayout.from_provenance(provenance), provenance)
    with ShardWriter(tmp_path / "s.h5", spec) as writer:
        writer.write(0, grids.copy(), {})
        writer.write(0, -grids, {}, "hflip")
        writer.finish()
    records = [ImageRecord(i, names[i], ("a cat",)) for i in range(2, 12)]  # so rows are other numbers than positions
    data = CaptionedImages.join(FeatureStore(tmp_path / "s.h5"), records, Path("captions"))
    stream = CaptionStream(data, Vocabulary.build(["a cat"]), StreamOptions(5, 1, 10, seed=3))
    for epoch in range(3):
        for batch in stream.epoch(epoch):
            rows = data.rows[batch.images]
            signs = 1 - 2 * sample_views(2, 3, epoch, rows)
            want = (grids[rows] * signs[:, None, None, None]).reshape(len(rows), 4, 3)
            np.testing.assert_array_equal(batch.grids.numpy(), want)
    np.testing.assert_array_equal(
        np.concatenate([b.grids.numpy() for b in stream.in_order()]).ravel(), grids[2:].ravel()
    )
