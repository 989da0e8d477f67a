"""Encoders from timm: the last feature map of a CNN, or the patch tokens of a vision transformer as a grid."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gridcap.common.errors import UserError, WeightsError, first_line
from gridcap.common.files import sha256_of
from gridcap.extract.encoders.registry import TIMM, Encoder, EncoderSettings, EncoderSpec, register_encoder
from gridcap.extract.encoders.weights import WeightsIdentity, identify_file, read_state_dict

try:
    import timm
    from timm.data.config import resolve_data_config
except ImportError as error:
    raise UserError(
        "encoders timm/... need the package timm, which is not installed", "pip install 'gridcap[timm]'"
    ) from error

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_NAME = re.compile(r"(?P<tag>\S+) \(\S+, revision (?P<revision>\w+)\)")


class _Grid(nn.Module):
    """A timm model that returns feature grids (B, rows, columns, channels).

    Args:
        model: created with `num_classes=0`, or with `features_only=True`.
        features_only: whether the model returns a list of feature maps (B, C, H, W).
    """

    def __init__(self, model: nn.Module, features_only: bool) -> None:
        super().__init__()
        self.model, self.features_only = model, features_only

    def forward(self, images: Tensor) -> Tensor:
        """Return the grids of normalized images (B, 3, side, side)."""
        if self.features_only:
            maps: Tensor = self.model(images)[-1]
            return maps if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else maps.permute(0, 2, 3, 1)
        features = self.model.forward_features(images)  # type: ignore[operator]
        if isinstance(features, Tensor) and features.ndim == 4:
            is_last = getattr(self.model, "output_fmt", None) == "NHWC" or features.shape[1] != self.model.num_features
            return features if is_last else features.permute(0, 2, 3, 1)
        grid = self._tokens(features, images) if isinstance(features, Tensor) and features.ndim == 3 else None
        return self._last_map(images) if grid is None else grid

    def _last_map(self, images: Tensor) -> Tensor:
        """Return the last feature map of a model with several outputs, or with a class token only."""
        if not hasattr(self.model, "forward_intermediates"):
            raise NotImplementedError("no feature map")
        maps: list[Tensor] = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=1, output_fmt="NCHW", intermediates_only=True
        )
        return maps[-1].permute(0, 2, 3, 1)

    def _tokens(self, tokens: Tensor, images: Tensor) -> Tensor | None:
        """Arrange patch tokens (B, N, C) as a grid, without class and register tokens; None if they are no grid."""
        count = tokens.shape[1]
        prefix = getattr(self.model, "num_prefix_tokens", None)
        for dropped in (0, 1) if prefix is None else (prefix,):
            shape = self._patch_grid(count - dropped, images)
            if shape is not None:
                return tokens[:, dropped:].reshape(len(tokens), *shape, tokens.shape[2])
        return None

    def _patch_grid(self, count: int, images: Tensor) -> tuple[int, int] | None:
        patches: Any = getattr(self.model, "patch_embed", None)
        size = getattr(patches, "grid_size", None)
        if hasattr(patches, "dynamic_feat_size"):
            size = patches.dynamic_feat_size(images.shape[-2:])
        if isinstance(size, tuple) and math.prod(size) == count:
            return size
        side = math.isqrt(count)
        return (side, side) if side > 1 and side * side == count else None


@register_encoder(TIMM)
class TimmEncoder(Encoder):
    """Any model of timm with a feature map or patch tokens: ``timm/NAME`` or ``timm/NAME.TAG``.

    Mean, standard deviation, interpolation, crop, and input size come from timm's data configuration. `settings.layer`
    is an index or a name of timm's ``features_only`` maps.

    Raises:
        UserError: the model does not exist or has no feature map, or a setting is invalid.
    """

    def __init__(self, name: str, settings: EncoderSettings) -> None:
        self._name = name.removeprefix(TIMM)
        if not timm.is_model(self._name.partition(".")[0]):
            similar = difflib.get_close_matches(self._name.partition(".")[0], timm.list_models())
            hint = f"did you mean {TIMM}{f' or {TIMM}'.join(similar)}? " if similar else ""
            raise UserError(f"encoder {name!r}: timm has no such model", f"{hint}gridcap encoders 'timm/*' lists all")
        self._arguments: dict[str, Any] = {}
        self.versions = {"torch": torch.__version__, "timm": timm.__version__}
        with torch.device("meta"), torch.inference_mode():
            model = self._create_sized(settings)
            data = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
            layer = self._find_layer(settings.layer)
            side = settings.image_size or max(data["input_size"][1:])
            self.spec = EncoderSpec(
                name,
                layer or "forward_features",
                side,
                self._measure_grid(name, model, layer, side),
                settings.mean or tuple(data["mean"]),
                settings.std or tuple(data["std"]),
                data["interpolation"] if data["interpolation"] != "random" else "bilinear",
                data["crop_pct"],
            )

    def _create_sized(self, settings: EncoderSettings) -> nn.Module:
        """Create the model for the chosen image size; record the arguments that this needs."""
        if settings.image_size is not None:
            try:
                arguments = {"img_size": settings.image_size}
                model = self._create(**arguments)
            except TypeError:  # a CNN, which takes images of any size
                pass
            except Exception as error:
                raise _wrong_size(self._name, settings.image_size, error) from error
            else:
                self._arguments = arguments
                return model
        return self._create()

    def _create(self, **arguments: Any) -> nn.Module:
        model: nn.Module = timm.create_model(self._name, num_classes=0, **arguments).eval()
        return model

    def _find_layer(self, layer: str | None) -> str | None:
        """Return the name of a feature map, given its name or index.

        Names consist of the index and timm's name of the module: "3.layer3".
        """
        if layer is None or layer == "forward_features":
            return None
        try:
            names: list[str] = self._create_features(None).feature_info.module_name()  # type: ignore[operator, union-attr]
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise UserError(f"--layer {layer}: timm/{self._name} has one feature map only", "omit --layer") from error
        known = [f"{index}.{name}" for index, name in enumerate(names)]
        matches = [full for full, name in zip(known, names, strict=True) if layer in (full, name, full.split(".")[0])]
        if not matches:
            raise UserError(
                f"--layer {layer}: not a feature map of timm/{self._name}", f"use one of {', '.join(known)}"
            )
        return matches[0]

    def _create_features(self, index: int | None, **arguments: Any) -> nn.Module:
        arguments |= self._arguments | ({} if index is None else {"out_indices": (index,)})
        model: nn.Module = timm.create_model(self._name, features_only=True, **arguments).eval()
        return model

    def _measure_grid(self, name: str, model: nn.Module, layer: str | None, side: int) -> tuple[int, int, int]:
        """Return the shape of a grid, from a forward pass without data."""
        network = _Grid(model, False) if layer is None else _Grid(self._create_features(_index(layer)), True)
        try:
            _, rows, columns, channels = network(torch.empty(1, 3, side, side)).shape
        except NotImplementedError as error:
            raise UserError(f"{name}: has no feature map", "choose another model: gridcap encoders 'timm/*'") from error
        except Exception as error:  # models assert, divide, or view as they like
            raise _wrong_size(self._name, side, error) from error
        return (rows, columns, channels)

    def identify_weights(self, weights: str, download: bool = True) -> WeightsIdentity:
        """Locate weights.

        Args:
            weights: "imagenet" (timm's default tag), TAG, TAG@REVISION, "random[:SEED]", or a file.
            download: as for `Encoder.identify_weights`.
        """
        if match := re.fullmatch(r"random(?::(\d+))?", weights):
            seed = int(match[1] or 0)
            recipe = f"timm's initialization; {self._name}, seed {seed}"
            return WeightsIdentity(f"random:{seed}", hashlib.sha256(recipe.encode()).hexdigest(), True, None)
        tag, _, revision = weights.partition("@")
        model, _, default = self._name.partition(".")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]
        if weights != "imagenet" and tag not in tags:
            if Path(weights).suffix or Path(weights).exists():
                return identify_file(weights)
            known = f"imagenet, {', '.join(tags)}" if tags else "random (timm has no weights of this model)"
            raise WeightsError(
                f"--weights {weights}: neither a file nor a tag of timm/{model}", f"use a file or {known}"
            )
        config = timm.get_pretrained_cfg(self._name if weights == "imagenet" else f"{model}.{tag}")
        if config is None or not config.hf_hub_id:
            raise WeightsError(f"timm/{self._name}: timm has no weights of this model", "pass a file with --weights")
        tag = tag if weights != "imagenet" else config.tag or default
        return self._from_hub(config, tag, revision or None, download)

    def _from_hub(self, config: Any, tag: str, revision: str | None, download: bool) -> WeightsIdentity:
        """Return the identity of weights on the Hugging Face Hub; download them once."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        names = [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES
        for name in names:
            try:
                file = Path(hf_hub_download(config.hf_hub_id, name, revision=revision, local_files_only=not download))
            except LocalEntryNotFoundError as error:
                if not download:
                    return WeightsIdentity("imagenet (not downloaded yet)", "", False, None)
                raise _not_available(config, error) from error
            except EntryNotFoundError:
                continue
            except Exception as error:  # the hub's client raises errors of several HTTP libraries
                raise _not_available(config, error) from error
            label = f"{tag} ({config.hf_hub_id}, revision {file.parent.name[:12]})"
            return WeightsIdentity(label, sha256_of(file), False, file)
        raise WeightsError(f"{config.hf_hub_id}: contains none of {', '.join(names)}", "pass a file with --weights")

    def weights_argument(self, name: str) -> str | None:
        """Return the value of --weights for the recorded name of weights."""
        match = _HUB_NAME.fullmatch(name)
        return f"{match['tag']}@{match['revision']}" if match else None

    def build(self, identity: WeightsIdentity) -> nn.Module:
        """Build the model and load its weights."""
        layer = None if self.spec.layer == "forward_features" else self.spec.layer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(identity.name.partition(":")[2]) if identity.random else 0)
            model = self._create_loaded(layer, {}) if identity.file is None else self._load(layer, identity.file)
        return _Grid(model, layer is not None).eval()

    def _create_loaded(self, layer: str | None, weights: dict[str, Any]) -> nn.Module:
        if layer is None:
            return self._create(**self._arguments, **weights)
        return self._create_features(_index(layer), **weights)

    def _load(self, layer: str | None, file: Path) -> nn.Module:
        """Create the model with the weights of a file, which timm converts if they come from another library."""
        state = read_state_dict(file)
        overlay: dict[str, Any] = {"state_dict": state}
        # timm ignores missing weights if it has to drop a classifier, so drop the classifier here.
        config = timm.get_pretrained_cfg(self._name)
        names = getattr(config, "classifier", None) or ()
        classifiers = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
        strict = {"state_dict": {k: v for k, v in state.items() if not k.startswith(classifiers)}, "num_classes": 0}
        try:
            return self._create_loaded(layer, {"pretrained": True, "pretrained_cfg_overlay": strict})
        except (RuntimeError, KeyError) as error:
            if "Missing key" in str(error) or "size mismatch" in str(error) or "Unexpected key" not in str(error):
                raise WeightsError(
                    f"{file}: not weights of {self.spec.name}: {_mismatch(error)}", "check --encoder and --weights"
                ) from error
        # Only unexpected keys, such as a second classifier: they do not matter.
        return self._create_loaded(layer, {"pretrained": True, "pretrained_cfg_overlay": overlay})


def _index(layer: str) -> int:
    return int(layer.partition(".")[0])


def _mismatch(error: Exception) -> str:
    """Return the line of PyTorch's message that names the first key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else first_line(error)


def _wrong_size(model: str, side: int, error: Exception) -> UserError:
    return UserError(
        f"--image-size {side}: not supported by timm/{model}: {first_line(error)}",
        "omit it, or use a multiple of the patch size",
    )


def _not_available(config: Any, error: Exception) -> WeightsError:
    return WeightsError(
        f"{config.hf_hub_id}: cannot be downloaded: {first_line(error)}",
        "check the network, download the file on another machine, or pass a file with --weights",
    )
