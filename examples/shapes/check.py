"""Says what a picture shows, in the toy's words: the check of training, demo and tests."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, inside

Picture = NDArray[np.floating]


def describe(picture: Picture) -> Scene | None:
    """The scene that a picture shows, or None when nothing stands out from its background.

    Args:
        picture: (height, width, 3), RGB in 0…1.
    """
    height, width, _ = picture.shape
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    background = np.median(border, axis=0)
    contrast = np.linalg.norm(picture - background, axis=-1)
    if contrast.max() < 0.2:
        return None
    colour = np.median(picture[contrast > 0.7 * contrast.max()], axis=0)
    mask = np.linalg.norm(picture - colour, axis=-1) < contrast
    left, right = _extent(mask.sum(axis=0))
    top, bottom = _extent(mask.sum(axis=1))
    centre = np.array([left + right, top + bottom]) / 2
    half = np.array([right - left, bottom - top]) / 2
    side = np.array([width, height])
    return Scene(
        size=_nearest(SIZES, np.sqrt(np.prod(half / side))),
        colour=_nearest(COLOURS, colour),
        shape=_best_shape(mask, centre, half),
        place=_nearest(PLACES, centre / side),
        background=_nearest(COLOURS, background),
    )


def accuracy(pictures: Sequence[Picture], scenes: Sequence[Scene]) -> dict[str, float]:
    """Fraction of the pictures that show what was asked for: of each of its parts, and "all"."""
    seen = [describe(picture) or (None,) * len(Scene._fields) for picture in pictures]
    right = np.array(seen, dtype=object) == np.array(scenes, dtype=object)
    parts = dict(zip(Scene._fields, right.mean(axis=0).tolist(), strict=True))
    return parts | {"all": float(right.all(axis=1).mean())}


def _extent(counts: NDArray[np.integer]) -> tuple[int, int]:
    """First and last + 1 of the rows (columns) that the shape fills with more than a speck."""
    filled = np.flatnonzero(counts > 0.06 * counts.max())
    return int(filled[0]), int(filled[-1]) + 1


def _nearest(table: Mapping[str, object], value: object) -> str:
    distances = {name: np.linalg.norm(np.subtract(entry, value)) for name, entry in table.items()}
    return min(distances, key=distances.__getitem__)


def _best_shape(mask: NDArray[np.bool_], centre: Picture, half: Picture) -> str:
    """The shape that covers the mask best (intersection over union)."""
    y, x = np.indices(mask.shape) + 0.5
    u, v = (x - centre[0]) / half[0], (y - centre[1]) / half[1]

    def overlap(shape: str) -> float:
        template = inside(shape, u, v)
        return float((template & mask).sum() / (template | mask).sum())

    return max(SHAPES, key=overlap)
