"""Rendered scenes: one colored object at one of five positions, with captions.

Used by the demo data set and as the fixed batch on which randomly initialized encoders calibrate their BatchNorm
statistics. Every pixel is a pure function of the seed, on every machine.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZES = {"small": 0.24, "large": 0.44}  # side of the object / side of the image
COLORS = {
    "red": (214, 32, 32),
    "green": (24, 150, 54),
    "blue": (30, 60, 214),
    "yellow": (244, 214, 24),
    "white": (252, 252, 252),
    "black": (12, 12, 12),
}
SHAPES = ("ring", "square", "triangle", "cross")
PLACES = {  # center of the object, (x, y) / side of the image
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "center": (0.50, 0.50),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}

# Synonyms: the first word is the value of the attribute. No word belongs to two values.
SYNONYMS = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "center": ("center", "middle"),
}
TEMPLATES = (
    "a {size} {color} {shape} in the {place}",
    "there is a {size} {color} {shape} in the {place} of the picture",
    "in the {place} sits a {size} {shape} painted {color}",
    "the {shape} in the {place} is {size} and {color}",
    "this picture shows one {color} {shape} , {size} , in the {place}",
)


@dataclass(frozen=True, order=True)
class Scene:
    """The four attributes of a scene."""

    size: str
    color: str
    shape: str
    place: str


def all_scenes() -> list[Scene]:
    """Return all combinations of attributes in a fixed order: 2 x 6 x 4 x 5 = 240."""
    return [Scene(*parts) for parts in itertools.product(SIZES, COLORS, SHAPES, PLACES)]


def render(scene: Scene, rng: np.random.Generator, side: int = 320) -> Image.Image:
    """Render a scene: the object with jittered position and size on a noisy gray gradient.

    Args:
        scene: attributes.
        rng: source of the jitter and the noise.
        side: side of the image in pixels.

    Returns:
        RGB image of `side` x `side` pixels.
    """
    base, slope_x, slope_y = rng.uniform(105, 165), *rng.uniform(-25, 25, 2)
    ramp = np.linspace(-0.5, 0.5, side)
    gray = base + slope_x * ramp[None, :] + slope_y * ramp[:, None] + rng.normal(0, 4, (side, side))
    image = Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8)).convert("RGB")

    x, y = (np.array(PLACES[scene.place]) + rng.uniform(-0.03, 0.03, 2)) * side
    half = SIZES[scene.size] * rng.uniform(0.92, 1.08) * side / 2
    color = tuple(int(c) for c in np.clip(np.array(COLORS[scene.color]) + rng.integers(-8, 9, 3), 0, 255))
    draw = ImageDraw.Draw(image)
    box = (x - half, y - half, x + half, y + half)
    if scene.shape == "ring":
        draw.ellipse(box, outline=color, width=round(half * 0.36))
    elif scene.shape == "square":
        draw.rectangle(box, fill=color)
    elif scene.shape == "triangle":
        draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=color)
    else:
        arm = half * 0.30
        draw.rectangle((x - arm, y - half, x + arm, y + half), fill=color)
        draw.rectangle((x - half, y - arm, x + half, y + arm), fill=color)
    return image


def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return five captions with different wording. Each names all four attributes."""

    def word(name: str) -> str:
        choices = SYNONYMS.get(name, (name,))
        return choices[int(rng.integers(len(choices)))]

    captions = []
    for template in TEMPLATES:
        place = word(scene.place) if scene.place == "center" else f"{scene.place} corner"
        captions.append(template.format(size=word(scene.size), color=scene.color, shape=scene.shape, place=place))
    return captions


def parse(caption: str) -> dict[str, str | None]:
    """Return the attributes that a caption names; None for an attribute with no value or contradictory values."""
    words = caption.lower().replace(",", " ").split()
    text = f" {' '.join(words)} "

    def named(values: dict[str, object] | tuple[str, ...] | dict[str, float]) -> str | None:
        matches = {v for v in values if any(f" {w} " in text for w in SYNONYMS.get(v, (v,)))}
        return matches.pop() if len(matches) == 1 else None

    return {
        "size": named(SIZES),
        "color": named(tuple(COLORS)),
        "shape": named(SHAPES),
        "place": named(tuple(PLACES)),
    }


def calibration_batch(count: int, side: int) -> np.ndarray:
    """Return the fixed batch for BatchNorm calibration.

    Args:
        count: number of scenes B, spread evenly over all combinations.
        side: side of each image in pixels.

    Returns:
        uint8 (B, side, side, 3), RGB.
    """
    scenes = all_scenes()
    selected = [scenes[i * len(scenes) // count] for i in range(count)]
    return np.stack([np.asarray(render(s, np.random.default_rng([20150, i]), side)) for i, s in enumerate(selected)])
