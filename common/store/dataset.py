"""Feature store as a PyTorch dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gridcap.common.store.shard_format import ORIGINAL

if TYPE_CHECKING:
    from gridcap.common.store.reader import FeatureStore


class FeatureDataset(Dataset[tuple[Tensor, int]]):
    """Map-style dataset of the valid images of a store, for a `DataLoader` with any number of workers.

    Items are (grid, image_id): a tensor of shape grid_shape and the type that the store returns, and an int.

    Args:
        store: the store.
        view: view of each image.
    """

    def __init__(self, store: FeatureStore, view: str = ORIGINAL) -> None:
        self.store = store
        self.view = view
        self._rows = np.flatnonzero(store.valid)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Return several items with one read. `DataLoader` calls this for each batch."""
        rows = self._rows[indices]
        grids = torch.from_numpy(self.store.rows(rows, views=self.view))
        return list(zip(grids, self.store.image_id[rows].tolist(), strict=True))
