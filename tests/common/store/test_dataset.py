"""The PyTorch view of a store works with a DataLoader in any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from gridcap.common.store.reader import FeatureStore

WriteStore = Callable[..., tuple[Path, np.ndarray]]
INVALID = {1: "not an image", 5: "empty file"}
VALID = [0, 2, 3, 4, 6, 7, 8]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, write_store: WriteStore) -> tuple[Path, np.ndarray]:
    return write_store(tmp_path_factory.mktemp("features") / "train.h5", invalid_reasons=INVALID)


def test_items_are_the_valid_images(stored: tuple[Path, np.ndarray]) -> None:
    path, grids = stored
    with FeatureStore(path) as store:
        dataset = store.as_dataset()
        assert isinstance(dataset, Dataset)
        assert len(dataset) == len(VALID)
        for index, row in enumerate(VALID):
            grid, image_id = dataset[index]
            assert (grid.dtype, image_id) == (torch.float16, 10 * row)
            np.testing.assert_array_equal(grid.numpy(), grids[row])
        with pytest.raises(IndexError):
            dataset[len(VALID)]
        assert [image_id for _, image_id in Subset(dataset, [3, 0])] == [40, 0]


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "spawn")])
def test_data_loader_with_workers(stored: tuple[Path, np.ndarray], workers: int, method: str | None) -> None:
    path, grids = stored
    with FeatureStore(path) as store:
        store[0]  # the store has open files and is in use
        loader = DataLoader(store.as_dataset(), batch_size=3, num_workers=workers, multiprocessing_context=method)
        batches = list(loader)
    assert torch.cat([ids for _, ids in batches]).tolist() == [10 * row for row in VALID]
    np.testing.assert_array_equal(torch.cat([part for part, _ in batches]).numpy(), grids[VALID])
