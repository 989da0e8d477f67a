"""GridEncoder: a frozen CNN cut at its last grid, with its weights and its preprocessing."""

from __future__ import annotations

import hashlib
import http.client
import math
import pickle
import re
import urllib.error
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models

from gridcap.common.device import choose_device, choose_precision
from gridcap.common.errors import UserError, WeightsError, first_line
from gridcap.common.files import sha256_of
from gridcap.common.scenes import calibration_batch
from gridcap.extract.encoders.packed import can_pack, pack_convolutions
from gridcap.extract.staging import PendingGrids, Staging

CALIBRATION_IMAGES = 32
# Raised by whatever changes the last digits of a grid: how images are made square, how convolutions are computed.
# A store that was begun with another is not finished with this one.
ARITHMETIC = "arithmetic 2"
RANDOM_RECIPE = "gridcap random weights, recipe 2: Kaiming uniform, BatchNorm calibrated on 32 scenes, one thread"


@dataclass(frozen=True)
class EncoderSpec:
    """One CNN: how to build it, where to cut it, what it wants to see.

    `mean` and `std` are of values in [0, 1], by channel. For inception_v3 they are 0.5: torchvision's weights
    were trained on values in [-1, 1], which its `transform_input` makes from ImageNet-normalized input.
    """

    build: Callable[..., nn.Module]
    weights: Any
    layers: tuple[str, ...]
    side: int
    grid_shape: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_RESNET_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
_INCEPTION_LAYERS = (
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "maxpool1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "maxpool2",
    "Mixed_5b",
    "Mixed_5c",
    "Mixed_5d",
    "Mixed_6a",
    "Mixed_6b",
    "Mixed_6c",
    "Mixed_6d",
    "Mixed_6e",
    "Mixed_7a",
    "Mixed_7b",
    "Mixed_7c",
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _resnet(build: Callable[..., nn.Module], weights: Any) -> EncoderSpec:
    return EncoderSpec(build, weights.IMAGENET1K_V1, _RESNET_LAYERS, 256, (8, 8, 2048), *_IMAGENET)


ENCODERS = {
    "inception_v3": EncoderSpec(
        lambda: models.inception_v3(weights=None, init_weights=False),
        models.Inception_V3_Weights.IMAGENET1K_V1,
        _INCEPTION_LAYERS,
        299,
        (8, 8, 2048),
        (0.5,) * 3,
        (0.5,) * 3,
    ),
    "resnet50": _resnet(models.resnet50, models.ResNet50_Weights),
    "resnet101": _resnet(models.resnet101, models.ResNet101_Weights),
    "resnet152": _resnet(models.resnet152, models.ResNet152_Weights),
}


@dataclass(frozen=True)
class WeightsIdentity:
    """Which weights: a name for people and a SHA-256 that tells them apart.

    For a file it is the file's SHA-256. Random weights are a function of the encoder, the seed and the scenes
    that calibrate them; theirs is the SHA-256 of that recipe.
    """

    name: str
    sha256: str
    random: bool
    file: Path | None

    def as_dict(self) -> dict[str, Any]:
        """For the provenance. It says loudly when the weights are random."""
        return {"name": self.name, "sha256": self.sha256, "random": self.random}


def identify_weights(encoder: str, weights: str, download: bool = True) -> WeightsIdentity:
    """Find the weights, downloading them once if need be, without building the encoder.

    Args:
        encoder: a key of ENCODERS.
        weights: "imagenet", "random", "random:SEED", or a file.
        download: fetch ImageNet weights that are not in torch's cache; else their identity says "not downloaded".

    Raises:
        WeightsError: cannot be downloaded, damaged, or no such file.
    """
    if match := re.fullmatch(r"random(?::(\d+))?", weights):
        seed = int(match[1] or 0)
        recipe = hashlib.sha256(f"{RANDOM_RECIPE}; {encoder}, seed {seed}".encode())
        recipe.update(calibration_batch(CALIBRATION_IMAGES, ENCODERS[encoder].side).data)
        return WeightsIdentity(f"random:{seed}", recipe.hexdigest(), True, None)
    if weights == "imagenet":
        file = _imagenet_cache(encoder)
        if not download and not file.exists():
            return WeightsIdentity("imagenet (not downloaded yet)", "", False, None)
        _ensure_imagenet(encoder, file)
        return WeightsIdentity(imagenet_name(encoder), sha256_of(file), False, file)
    file = Path(weights)
    if not file.is_file():
        raise WeightsError(f"{file}: no such weights file", "use --weights imagenet, random, or the path of a file")
    return WeightsIdentity(file.name, sha256_of(file), False, file)


def imagenet_name(encoder: str) -> str:
    """What provenances call torchvision's own weights of an encoder."""
    return f"imagenet ({ENCODERS[encoder].weights.name})"


def _imagenet_cache(encoder: str) -> Path:
    """Where torch's cache keeps torchvision's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / str(ENCODERS[encoder].weights.url).rpartition("/")[2]


def _ensure_imagenet(encoder: str, file: Path) -> None:
    """Download torchvision's weights into torch's cache if they are not there; check them against their name."""
    url: str = ENCODERS[encoder].weights.url
    name = file.name
    by_hand = f"download {url} on another machine and put it there, or give the file with --weights"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=_hash_in(name))
        except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", None) or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise WeightsError(f"{file}: not there, and the download failed: {reason}", by_hand) from error
    if not sha256_of(file).startswith(_hash_in(name)):
        raise WeightsError(
            f"{file}: damaged: its SHA-256 does not start with {_hash_in(name)}", f"delete it; {by_hand}"
        )


def _hash_in(name: str) -> str:
    """The start of the SHA-256 that torchvision writes into its file names: name-0cc3c7bd.pth."""
    return name.rpartition("-")[2].partition(".")[0]


_STATE_DICT = "give a state dict saved by torch.save or as .safetensors; whole pickled models are refused"


def _read_state(file: Path) -> dict[str, Tensor]:
    """A state dict from a file, never running code from it."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{file}: cannot be read as weights: it is no state dict of tensors", _STATE_DICT) from error
    except Exception as error:  # whatever a damaged file leads the loaders to raise
        raise WeightsError(f"{file}: cannot be read as weights: {first_line(error)}", _STATE_DICT) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{file}: holds no state dict (names -> tensors)", "give a state dict of the encoder")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _build_trunk(encoder: str, identity: WeightsIdentity) -> nn.Sequential:
    """The CNN up to its grid, float32, on the CPU, with its weights."""
    spec = ENCODERS[encoder]
    whole = spec.build()
    trunk = nn.Sequential(OrderedDict((name, getattr(whole, name)) for name in spec.layers))
    if identity.file is None:
        _initialize(trunk, int(identity.name.partition(":")[2]), spec)
        return trunk.eval()
    state = _read_state(identity.file)
    wanted = {k: v for k, v in state.items() if k.partition(".")[0] in spec.layers}
    try:
        missing, unexpected = trunk.load_state_dict(wanted, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise WeightsError(f"{identity.file}: not weights of {encoder}: {detail}", "check --encoder") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is none of its layers"
        more = len(missing) + len(unexpected) - 1
        raise WeightsError(
            f"{identity.file}: not weights of {encoder}: {what}" + (f" (and {more} more)" if more else ""),
            "check --encoder",
        )
    return trunk.eval()


@torch.no_grad()
def _initialize(trunk: nn.Sequential, seed: int, spec: EncoderSpec) -> None:
    """Random weights that carry an image's layout: Kaiming uniform (He et al. 2015, arXiv:1502.01852), and
    BatchNorm statistics from a fixed batch of rendered scenes, so that no layer fades or explodes.

    The numbers come from numpy, whose streams are the same on every machine.
    """
    convolutions = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    for i, layer in enumerate(convolutions):
        bound = math.sqrt(6 / (layer.in_channels // layer.groups * math.prod(layer.kernel_size)))
        values = np.random.default_rng([seed, i]).uniform(-bound, bound, tuple(layer.weight.shape))
        layer.weight.copy_(torch.from_numpy(values.astype(np.float32)))
    for norm in trunk.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_parameters()
            norm.momentum = None  # the plain average over the one batch that follows
    trunk.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums round by how many threads share them, and workers may have few or many
    trunk(_normalize(torch.from_numpy(calibration_batch(CALIBRATION_IMAGES, spec.side)), spec, torch.float32))
    torch.set_num_threads(threads)


def _normalize(images: Tensor, spec: EncoderSpec, dtype: torch.dtype) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in channels_last memory, as the encoder was trained to see it."""
    if dtype == torch.bfloat16 and {*spec.mean, *spec.std} == {0.5}:  # all but the quotient is exact in its 8 bits
        return images.to(dtype).sub_(255 / 2).div_(255 / 2).permute(0, 3, 1, 2)
    mean = torch.tensor(spec.mean, device=images.device) * 255
    scale = 1 / (torch.tensor(spec.std, device=images.device) * 255)
    return ((images.float() - mean) * scale).to(dtype).permute(0, 3, 1, 2)


def _fold_batch_norm(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it: the same function, a quarter less memory traffic."""
    children = list(module.named_children())
    for (name, layer), (norm_name, norm) in zip(children, children[1:], strict=False):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, norm_name, nn.Identity())
    for _, child in children:
        _fold_batch_norm(child)


class GridEncoder:
    """A frozen CNN: square images in, grids out.

    Args:
        name: a key of ENCODERS.
        identity: which weights, from `identify_weights`.
        precision: auto, float32, bfloat16 or float16: the arithmetic.
        device: auto, cpu, cuda, ...
        dtype: of the grids it returns, "float16" or "float32".
        compiled: run code that torch.compile makes here for batches of `batch_size` (see `choose_compile`).
        batch_size: the largest batch that compiled code takes. A smaller one is filled up to it, so that nothing is
            compiled a second time; grids depend on it in their last digits, so it belongs to the plan.

    Attributes:
        side: of the square images, in pixels.
        grid_shape: (row, column, channel) of a grid.

    Raises:
        WeightsError: the weights do not fit the encoder.
        UserError: `compiled`, and torch.compile failed.
    """

    def __init__(
        self,
        name: str,
        identity: WeightsIdentity,
        precision: str,
        device: str,
        dtype: str,
        compiled: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.spec = ENCODERS[name]
        self.device = choose_device(device)
        self.side = self.spec.side
        self.grid_shape = self.spec.grid_shape
        self._precision = choose_precision(precision, self.device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        trunk: nn.Module = _build_trunk(name, identity)
        _fold_batch_norm(trunk)
        trunk.requires_grad_(False)
        trunk.to(self.device, self._precision).to(memory_format=torch.channels_last)
        if self.device.type == "cpu" and not compiled and can_pack(self._precision):
            blank = torch.zeros(1, self.side, self.side, 3, dtype=torch.uint8)
            trunk = pack_convolutions(trunk, _normalize(blank, self.spec, self._precision), batch_size)
        self._trunk: Callable[[Tensor], Tensor] = trunk
        self._staging = Staging(self.device) if self.device.type == "cuda" else None
        self._fixed_batch = batch_size if compiled else None
        if compiled:
            self._trunk = _compile(trunk, self.device)
            self._first_run(name, batch_size)

    def _first_run(self, name: str, batch_size: int) -> None:
        """Compile now, before any shard is begun: torch.compile works at the first call."""
        try:
            self.encode(np.zeros((batch_size, self.side, self.side, 3), np.uint8))
        except Exception as error:  # dynamo, inductor, triton and the C++ compiler each raise their own
            raise UserError(
                f"--compile: torch.compile failed on {name}: {first_line(error)}",
                "use --compile off; a store that was begun compiled must be begun again",
            ) from error

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode a batch.

        Args:
            images: uint8 (B, side, side, 3), RGB.

        Returns:
            (B, *grid_shape) in the stored type: row, column, channel. Values beyond its range become infinite.
        """
        return self.submit(images).result()

    @torch.inference_mode()
    def submit(self, images: np.ndarray | Tensor) -> PendingGrids:
        """Begin to encode a batch. On a GPU this returns at once, and the grids are copied out while the next batch
        is computed, if two or three are kept pending; on the CPU the work is done on return.

        `images` may be changed as soon as this returns. One thread at a time may submit.

        Args:
            images: as for `encode`, or a tensor, on the CPU or on the encoder's device; at most `batch_size` of them
                if the encoder is compiled.
        """
        given = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
        if self._staging is None:
            grids = self._forward(given).numpy()
            return PendingGrids(lambda: grids)
        return self._staging.run(given, self._forward)

    def _forward(self, images: Tensor) -> Tensor:
        """uint8 (B, side, side, 3) -> (B, *grid_shape) in the stored type, contiguous, on the same device."""
        count = len(images)
        if self._fixed_batch is not None:
            if count > self._fixed_batch:
                raise ValueError(f"a batch of {count}, and the encoder is compiled for {self._fixed_batch}")
            images = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, self._fixed_batch - count))
        grids: Tensor = self._trunk(_normalize(images, self.spec, self._precision))[:count]
        return grids.permute(0, 2, 3, 1).to(self._dtype).contiguous()


def _compile(trunk: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The trunk through torch.compile, for one batch size; on a CPU with its weights laid out for it beforehand.

    Nothing here may choose kernels by timing them ("max-autotune"), since two runs would round differently; nor
    may the GPU replay CUDA graphs ("reduce-overhead"), which write the next batch's grids where this one's are
    still being copied from.
    """
    options: dict[str, Any] = {"freezing": True} if device.type == "cpu" else {}
    return torch.compile(trunk, dynamic=False, options=options)


def describe_features(
    encoder: str,
    identity: WeightsIdentity,
    resize_mode: str,
    precision: str,
    device: str,
    dtype: str,
    decoder: str,
    compiled: bool = False,
) -> dict[str, Any]:
    """The provenance of grids: everything that decides their numbers.

    Args:
        decoder: the image decoding library and its version; the rest as for `GridEncoder`.
    """
    spec = ENCODERS[encoder]
    library, _, version = decoder.partition(" ")
    return {
        "encoder": encoder,
        "layer": spec.layers[-1],
        "weights": identity.as_dict(),
        "preprocessing": {
            "decoder": library,
            "resize_mode": resize_mode,
            "side": spec.side,
            "resize": "bilinear, antialiased",
            "mean": list(spec.mean),
            "std": list(spec.std),
        },
        "grid_shape": list(spec.grid_shape),
        "dtype": dtype,
        "precision": str(choose_precision(precision, choose_device(device))).removeprefix("torch."),
        "compile": compiled,
        "versions": {
            library: version,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "gridcap": ARITHMETIC,
        },
    }
