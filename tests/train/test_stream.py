import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.annotations import ImageRecord
from common.errors import MismatchError, StoreError
from common.shard import ShardWriter
from common.store import FeatureStore
from train.stream import CaptionedImages, CaptionStream, choose_captions, choose_views, epoch_order, pad_captions
from train.vocabulary import BOS, EOS, PAD, Vocabulary

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
    return CaptionStream(data, vocabulary, batch_size=4, per_image=2, max_length=10, seed=5)


def texts_of(batch, vocabulary):
    """Per image of the batch, the captions of its rows that hold words."""
    return [[vocabulary.decode(row.tolist()) for row in image if row.any()] for image in batch.tokens]


# --- the order of an epoch ---


@given(st.integers(0, 300), NUMBERS, NUMBERS)
def test_epoch_order_is_a_permutation(count, seed, epoch):
    assert sorted(epoch_order(count, seed, epoch)) == list(range(count))


@given(st.integers(20, 100), NUMBERS, NUMBERS, NUMBERS)
def test_epoch_order_differs_by_epoch_and_by_seed(count, seed, a, b):
    same = a == b
    assert np.array_equal(epoch_order(count, seed, a), epoch_order(count, seed, b)) == same
    assert np.array_equal(epoch_order(count, a, seed), epoch_order(count, b, seed)) == same


@given(st.integers(1, 100), NUMBERS, NUMBERS)
def test_epoch_order_depends_on_nothing_but_its_arguments(count, seed, epoch):
    before = epoch_order(count, seed, epoch)
    np.random.seed(epoch % 1000)
    np.random.default_rng().random()
    torch.manual_seed(epoch)
    random.seed(epoch)
    epoch_order(count + 1, seed, epoch + 1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert np.array_equal(epoch_order(count, seed, epoch), before)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_epoch_order_is_the_same_in_every_version():
    """A resume on another machine needs the same order: these numbers must never change."""
    assert epoch_order(10, 0, 0).tolist() == [1, 2, 9, 0, 7, 4, 3, 8, 6, 5]
    assert epoch_order(10, 3, 7).tolist() == [9, 6, 4, 8, 0, 7, 1, 2, 3, 5]


# --- the choice of captions ---


@given(st.integers(1, 12), st.integers(1, 12), NUMBERS, NUMBERS, NUMBERS)
def test_captions_are_chosen_without_repeats(available, wanted, seed, epoch, row):
    chosen = choose_captions(available, wanted, seed, epoch, row)
    assert len(chosen) == len(set(chosen)) == min(available, wanted)
    assert set(chosen) <= set(range(available))
    assert chosen == choose_captions(available, wanted, seed, epoch, row)


def test_the_choice_of_captions_depends_on_seed_epoch_and_image():
    several = {
        "epoch": {tuple(choose_captions(30, 5, 0, epoch, 0)) for epoch in range(8)},
        "seed": {tuple(choose_captions(30, 5, seed, 0, 0)) for seed in range(8)},
        "row": {tuple(choose_captions(30, 5, 0, 0, row)) for row in range(8)},
    }
    assert {name: len(choices) for name, choices in several.items()} == {"epoch": 8, "seed": 8, "row": 8}


def test_every_caption_is_chosen_in_some_epoch():
    assert {i for epoch in range(60) for i in choose_captions(7, 2, 0, epoch, 3)} == set(range(7))


def test_padding_fills_short_captions_and_absent_ones():
    tokens = pad_captions([[[BOS, 7, EOS], [BOS, EOS]], [[BOS, 8, 9, EOS]]], per_image=3)
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
            stored = data.store.by_image_id(1000 + int(image))
            assert np.array_equal(grid.numpy(), stored.reshape(4, 8))
            assert len(texts) == min(2, len(captions_of(image)))
            assert len(set(texts)) == len(texts)
            assert set(texts) <= set(captions_of(image))
    assert seen == epoch_order(COUNT, 5, 3).tolist()


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


def test_captions_are_cut_to_max_length(data, vocabulary):
    stream = CaptionStream(data, vocabulary, batch_size=COUNT, per_image=4, max_length=2)
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
    stream = CaptionStream(data, vocabulary, batch_size=1, per_image=1, max_length=5)
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

    monkeypatch.setattr("train.stream.ThreadPoolExecutor", Pool)
    batches = CaptionStream(data, vocabulary, batch_size=1, per_image=1, max_length=5).epoch(0)
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
        list(CaptionStream(data, Vocabulary.build(["x"]), 4, 1, 5).epoch(0))


# --- joining a store with captions ---


def test_join_counts_what_it_leaves_out_and_keeps_the_order_of_the_store(tmp_path, new_store):
    store = new_store(tmp_path / "s.h5", np.ones((10, 2, 2, 8), np.float16), rejects={3: "truncated", 8: "no image"})
    records = [ImageRecord(i, f"folder/{i:03}.jpg", (f"text {i}",)) for i in (9, 8, 3, 2, 0, 77, 78, 79)]
    records += [ImageRecord(i, f"{i:03}.jpg") for i in (4, 5, 6, 7)]
    data = CaptionedImages.join(store, records, Path("c.json"))
    assert data.rows.tolist() == [0, 2, 9]
    assert data.captions == [("text 0",), ("text 2",), ("text 9",)]
    assert len(data) == 3
    assert data.left_out == {"not in the feature store": 3, "rejected in extraction": 2, "without captions": 4}


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
    drawn = [choose_views(2, 7, epoch, rows) for epoch in range(6)]
    for views in drawn:
        assert set(views) == {0, 1}
        assert 140 < views.sum() < 260
    assert len({views.tobytes() for views in drawn}) == 6
    np.testing.assert_array_equal(choose_views(2, 7, 3, rows[[5, 90]]), drawn[3][[5, 90]])
    assert choose_views(2, 8, 0, rows).tolist() != drawn[0].tolist()


def test_training_sees_the_drawn_view_and_validation_the_original(tmp_path):
    grids = np.arange(12 * 2 * 2 * 3).reshape(12, 2, 2, 3).astype("f2")
    provenance = {"grid_shape": [2, 2, 3], "dtype": "float16", "views": ["original", "hflip"]}
    names = [f"{i}.jpg" for i in range(12)]
    made_by = {"index": 0, "plan": "p", "provenance": provenance}
    views = ("original", "hflip")
    with ShardWriter(tmp_path / "s.h5", range(12), names, (2, 2, 3), "float16", made_by, views) as writer:
        writer.write(0, grids.copy(), {})
        writer.write(0, -grids, {}, "hflip")
        writer.finish()
    records = [ImageRecord(i, names[i], ("a cat",)) for i in range(12)]
    data = CaptionedImages.join(FeatureStore(tmp_path / "s.h5"), records, Path("captions"))
    stream = CaptionStream(data, Vocabulary.build(["a cat"]), 5, 1, 10, seed=3)
    for epoch in range(3):
        for batch in stream.epoch(epoch):
            rows = data.rows[batch.images]
            signs = 1 - 2 * choose_views(2, 3, epoch, rows)
            want = (grids[rows] * signs[:, None, None, None]).reshape(len(rows), 4, 3)
            np.testing.assert_array_equal(batch.grids.numpy(), want)
    np.testing.assert_array_equal(np.concatenate([b.grids.numpy() for b in stream.in_order()]).ravel(), grids.ravel())
