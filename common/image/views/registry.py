"""The registry of views."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

ImageFunction = Callable[[Image.Image, int, random.Random], Image.Image]
SquareFunction = Callable[[Any], Any]

MAX_VIEWS = 100  # of one name, in one store
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z][a-z0-9]*)*")
NUMBERED = re.compile(r"(?P<name>.+?)(?P<separator>[-:])(?P<number>[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class _View:
    """A registered view; see `register_view` and `register_square_view`."""

    name: str
    of_image: ImageFunction | None = None
    of_square: SquareFunction | None = None
    count: int | None = 0
    min_share: float = 1.0


@dataclass(frozen=True)
class SelectedView:
    """One view of a store.

    Attributes:
        name: its name in the store, such as "five-crop-3".
        number: the number in the name, from 1; 0 if it has none.
        min_share: smallest share of width and height that the view shows.
        of_square: function of resized images, (B, side, side, 3), an array or a tensor; None: see `apply`.
    """

    name: str
    number: int
    min_share: float
    of_square: SquareFunction | None
    _of_image: ImageFunction | None

    def apply(self, image: Image.Image, file_name: str) -> Image.Image:
        """Return the view of an RGB image before the resize.

        The same file name and the same view give the same result on every machine.
        """
        assert self._of_image is not None, "a view of the square"
        view = self._of_image(image, self.number, random.Random(f"{self.name}\0{file_name}"))
        return view if view.mode == "RGB" else view.convert("RGB")


_views: dict[str, _View] = {}


def register_view(
    name: str, *, count: int | None = 0, min_share: float = 1.0
) -> Callable[[ImageFunction], ImageFunction]:
    """Register a function (image, number, rng) -> image as a view; the result is resized for the encoder.

    Args:
        name: lowercase words separated by hyphens. Stores record the name, so a function that changes what it returns
            needs another name.
        count: number of views, named NAME-1, NAME-2, ...; 0: one view without a number; None: any number.
        min_share: smallest share of width and height that the function shows. Large JPEG files are decoded with
            enough pixels for it.
    """

    def register(function: ImageFunction) -> ImageFunction:
        _add(_View(name, function, count=count, min_share=min_share))
        return function

    return register


def register_square_view(name: str) -> Callable[[SquareFunction], SquareFunction]:
    """Register a function of resized images, which is cheaper and also works on a GPU.

    Args:
        name: as for `register_view`. The function maps uint8 (B, side, side, 3), an array or a tensor, to the same
            shape.
    """

    def register(function: SquareFunction) -> SquareFunction:
        _add(_View(name, of_square=function))
        return function

    return register


def expand_views(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the views in the store: "five-crop" is five views, "random-crop:4" is four.

    Raises:
        ValueError: an unknown view, or a missing, superfluous, or too large number.
    """
    expanded: list[str] = []
    for name in names:
        match = NUMBERED.fullmatch(name)
        view = _find(match["name"] if match else name)
        if match and match["separator"] == "-":
            expanded.append(select_view(name).name)
            continue
        count = int(match["number"]) if match else view.count
        if count is None:
            raise ValueError(f"view {name} needs a number of views, such as {name}:4")
        if match and (view.count == 0 or count > min(view.count or MAX_VIEWS, MAX_VIEWS)):
            raise ValueError(f"view {view.name} has {_describe_count(view)}")
        expanded += [f"{view.name}-{number + 1}" for number in range(count)] if count else [view.name]
    return tuple(expanded)


@functools.cache
def select_view(name: str) -> SelectedView:
    """Return a view of a store by its name.

    Raises:
        ValueError: an unknown view or number.
    """
    match = NUMBERED.fullmatch(name)
    view, number = _find(match["name"] if match else name), int(match["number"]) if match else 0
    if (view.count == 0) != (number == 0) or (view.count is not None and number > view.count):
        raise ValueError(f"view {view.name} has {_describe_count(view)}")
    return SelectedView(name, number, view.min_share, view.of_square, view.of_image)


def _add(view: _View) -> None:
    if not NAME.fullmatch(view.name):
        raise ValueError(f"view {view.name!r}: the name must be lowercase words separated by hyphens")
    if view.name in _views:
        raise ValueError(f"view {view.name!r} is registered twice")
    _views[view.name] = view


def _find(name: str) -> _View:
    _load_modules()
    if name in _views:
        return _views[name]
    close = difflib.get_close_matches(name, sorted(_views), n=1)
    question = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"unknown view {name!r}{question} (views: {', '.join(sorted(_views))})")


def _describe_count(view: _View) -> str:
    if view.count is None:
        return f"at most {MAX_VIEWS} views per store: {view.name}:1 to {view.name}:{MAX_VIEWS}"
    return f"{view.count} views: {view.name}-1 to {view.name}-{view.count}" if view.count else "no number"


@functools.cache
def _load_modules() -> None:
    """Import all modules of this package, which register their views."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
