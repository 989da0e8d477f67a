"""InceptionV3 weights in Keras's files, for users of the Keras and TensorFlow captioning tutorials.

Three layouts are read: HDF5 with layer names (``inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5`` and
``model.save("x.h5")``), ``.weights.h5``, and ``.keras``, a zip file with a ``model.weights.h5``. Layers come in the
order of ``keras.applications.inception_v3``.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import h5py
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, fx, nn
from torchvision.models.inception import BasicConv2d

from gridcap.common.errors import WeightsError

SUFFIXES = (".h5", ".hdf5", ".keras")
_HINT = "use the weights of keras.applications.InceptionV3, or a torch state dict"

# The convolutions of each kind of block in the order in which Keras creates (and numbers) them, and the order in which
# they come in `model.layers`, which sorts layers by depth and which files without layer names follow.
_A = (
    ("branch1x1", "branch5x5_1", "branch5x5_2", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", "branch_pool"),
    (3, 1, 4, 0, 2, 5, 6),
)
_B = (("branch3x3", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), (1, 2, 0, 3))
_C = (
    ("branch1x1", *(f"branch7x7_{i}" for i in (1, 2, 3)), *(f"branch7x7dbl_{i}" for i in range(1, 6)), "branch_pool"),
    (4, 5, 1, 6, 2, 7, 0, 3, 8, 9),
)
_D = (("branch3x3_1", "branch3x3_2", *(f"branch7x7x3_{i}" for i in range(1, 5))), (2, 3, 0, 4, 1, 5))
_E = (
    (
        "branch1x1",
        *("branch3x3_1", "branch3x3_2a", "branch3x3_2b"),
        *("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a", "branch3x3dbl_3b"),
        "branch_pool",
    ),
    (4, 1, 5, 2, 3, 6, 7, 0, 8),
)
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A),
    "Mixed_6a": _B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C),
    "Mixed_7a": _D,
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), _E),
}
CREATED = [*_STEM, *(f"{block}.{name}" for block, (names, _) in _BLOCKS.items() for name in names)]
SORTED_BY_DEPTH = [*_STEM, *(f"{block}.{names[i]}" for block, (names, order) in _BLOCKS.items() for i in order)]


def is_keras_file(file: Path) -> bool:
    """Return whether a weights file is one of Keras, by its suffix."""
    return file.suffix in SUFFIXES


def read_keras_weights(file: Path, encoder: str) -> dict[str, Tensor]:
    """Read weights as a state dict of torchvision's model, up to the grid.

    Args:
        file: a .h5, .weights.h5, or .keras file.
        encoder: name of the encoder.

    Raises:
        WeightsError: the encoder is not inception_v3, or the file is corrupted or contains another model.
        OSError: the file cannot be read.
    """
    if encoder != "inception_v3":
        raise WeightsError(f"{file}: Keras weights are supported for inception_v3 only, not for {encoder}", _HINT)
    try:
        if file.suffix == ".keras":
            with zipfile.ZipFile(file) as archive:
                content = io.BytesIO(archive.read("model.weights.h5"))
            with h5py.File(content, "r") as opened:
                return _state_dict(opened, file)
        with h5py.File(file, "r", locking=False) as opened:
            return _state_dict(opened, file)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise WeightsError(f"{file}: cannot be read as Keras weights: {error}", _HINT) from error


def _state_dict(file: h5py.File, path: Path) -> dict[str, Tensor]:
    names = SORTED_BY_DEPTH if "layers" in file else CREATED
    kernels = [layer for _, layer in sorted(_layers(file, path, "conv2d").items())]
    norms = [layer for _, layer in sorted(_layers(file, path, "batch_normalization").items())]
    if len(kernels) != len(names) or len(norms) != len(names):
        raise WeightsError(
            f"{path}: not Keras weights of inception_v3: {len(kernels)} convolutions and {len(norms)} BatchNorm layers "
            f"instead of {len(names)} of each",
            _HINT,
        )
    state: dict[str, Tensor] = {}
    for name, kernel, norm in zip(names, kernels, norms, strict=True):
        state[f"{name}.conv.weight"] = kernel["kernel"].permute(3, 2, 0, 1).contiguous()
        state[f"{name}.bn.bias"] = norm["beta"]
        state[f"{name}.bn.running_mean"] = norm["moving_mean"]
        state[f"{name}.bn.running_var"] = norm["moving_variance"]
        state[f"{name}.bn.weight"] = norm.get("gamma", torch.ones_like(norm["beta"]))  # Keras's has no scale
    return state


def _layers(file: h5py.File, path: Path, kind: str) -> Mapping[int, dict[str, Tensor]]:
    """Return number in the layer's name (0 if it has none) -> variable -> values, for the layers of one kind."""
    order = ["kernel"] if kind == "conv2d" else ["beta", "moving_mean", "moving_variance"]
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)

    def collect(name: str, item: object) -> None:
        *folders, last = name.split("/")
        numbers = [match[1] for folder in folders if (match := re.fullmatch(rf"{kind}(?:_(\d+))?", folder))]
        if isinstance(item, h5py.Dataset) and numbers:
            if item.external or item.is_virtual:
                raise WeightsError(f"{path}: the values of {name} are stored in another file", _HINT)
            variable = order[int(last)] if last.isdigit() and int(last) < len(order) else last.partition(":")[0]
            layers[int(numbers[-1] or 0)][variable] = torch.from_numpy(item[()])

    file.visititems(collect)
    return layers


class _Tracer(fx.Tracer):
    """Tracer that keeps BasicConv2d blocks as single nodes."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, BasicConv2d) or super().is_leaf_module(module, name)


def exclude_padding(trunk: nn.Module) -> nn.Module:
    """Return a CNN whose average pooling excludes the padding, as in Keras; torchvision's includes it."""
    traced = fx.GraphModule(trunk, _Tracer().trace(trunk))
    for node in traced.graph.nodes:
        if node.target is F.avg_pool2d:
            node.kwargs = {**node.kwargs, "count_include_pad": False}
    traced.recompile()
    return traced
