"""Clips of a real picture that moves: in go Fashion-MNIST pictures, out come 8 frames of 56x56 and a movement's name.

A picture glides over a black canvas, comes closer or goes away, or turns; which of the eight, from where and how fast
is drawn from the split and the picture's number, so that a split is the same everywhere. No single frame tells the
movement. The pictures of train, validation and test are those splits' own.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from . import fashion
from .cache import Progress, say

MOVEMENTS = ("left", "right", "up", "down", "closer", "away", "clockwise", "counterclockwise")
FRAMES = 8
SIDE = 56
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_SEEDS = {"train": 11, "validation": 12, "test": 13}


class Clips(Sequence):
    """(frames (8, 56, 56, 3) uint8, movement) of each picture, drawn when it is asked for."""

    def __init__(self, pictures: list[tuple[np.ndarray, str]], seed: int):
        self.pictures, self.seed = pictures, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        generator = np.random.default_rng((self.seed, index))
        movement = MOVEMENTS[int(generator.integers(len(MOVEMENTS)))]
        return frames(self.pictures[index][0], movement, generator), movement


def frames(picture: np.ndarray, movement: str, generator: np.random.Generator) -> np.ndarray:
    """The clip (8, 56, 56, 3) of a grey picture (28, 28). `generator` draws place, size, tilt and pace.

    Raises ValueError for a movement that is none of the eight.
    """
    if movement not in MOVEMENTS:
        raise ValueError(f"movement: found {movement!r}, expected one of {list(MOVEMENTS)}")
    scale, tilt = generator.uniform(0.9, 1.2), generator.uniform(-15, 15)
    x, y = generator.uniform(-4, 4, 2)
    way, growth, turn = generator.uniform(18, 28), generator.uniform(1.8, 2.4), generator.uniform(70, 120)
    made = []
    for progress in np.linspace(-0.5, 0.5, FRAMES):
        dx, dy = _STEPS.get(movement, (0, 0))
        size, angle = scale, tilt
        if movement in ("closer", "away"):
            size = scale * growth ** (progress if movement == "closer" else -progress)
        if movement in ("clockwise", "counterclockwise"):
            angle += turn * progress * (1 if movement == "clockwise" else -1)
        made.append(draw(picture, x + dx * way * progress, y + dy * way * progress, size, angle))
    return np.stack(made)


def draw(picture: np.ndarray, x: float, y: float, scale: float, angle: float) -> np.ndarray:
    """(56, 56, 3) uint8: the picture, its middle `x` right of and `y` below the canvas's, turned clockwise."""
    turn = np.deg2rad(angle)
    # from a place on the canvas back to the place in the picture that is shown there
    cosine, sine = np.cos(turn) / scale, np.sin(turn) / scale
    middle, own = (SIDE - 1) / 2, (picture.shape[0] - 1) / 2
    a, b, d, e = cosine, sine, -sine, cosine
    c = own - a * (middle + x) - b * (middle + y)
    f = own - d * (middle + x) - e * (middle + y)
    image = Image.fromarray(picture).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
    )
    return np.repeat(np.asarray(image)[..., None], 3, axis=-1)


def clips(split: str, cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Clips:
    """The clips of a split, one of each of its pictures."""
    return Clips(fashion.pictures(split, cache, progress), _SEEDS[split])
