"""The toy's world: one flat shape on a flat background, and the words for it.

Only Python's own names are used on arrays here, so that `inside` serves torch (training) and numpy
(checking a picture) alike.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

PIXELS = 128
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (0.88, 0.11, 0.14),
    "orange": (1.00, 0.53, 0.05),
    "yellow": (1.00, 0.88, 0.12),
    "green": (0.11, 0.62, 0.22),
    "cyan": (0.12, 0.79, 0.88),
    "blue": (0.11, 0.22, 0.86),
    "purple": (0.53, 0.12, 0.72),
    "pink": (1.00, 0.60, 0.76),
    "white": (1.00, 1.00, 1.00),
    "black": (0.06, 0.06, 0.06),
}
# Half of the shape's side, as a fraction of the picture's; "" is what no word asks for.
SIZES = {"small": 0.10, "": 0.16, "large": 0.22}
# Centre (x to the right, y down), as fractions of the picture's side.
PLACES = {
    "middle": (0.50, 0.50),
    "left": (0.25, 0.50),
    "right": (0.75, 0.50),
    "top": (0.50, 0.25),
    "bottom": (0.50, 0.75),
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
# What no word asks for either: drawn at random up to this far from SIZES and PLACES.
SIZE_JITTER = 0.015
PLACE_JITTER = 0.02

WORDS = (
    *("a", "on", "at", "in", "the", "background", "small", "large"),
    *("left", "right", "top", "bottom", "middle"),
    *SHAPES,
    *COLOURS,
)


class Scene(NamedTuple):
    """What a prompt says. Each value is a key of the table of that name, `SIZES`' "" included."""

    size: str
    colour: str
    shape: str
    place: str
    background: str


def all_scenes() -> list[Scene]:
    """Every scene whose shape can be told from its background, in a fixed order."""
    everything = product(SIZES, COLOURS, SHAPES, PLACES, COLOURS)
    return [scene for scene in map(Scene._make, everything) if scene.colour != scene.background]


def prompts(scene: Scene) -> Iterator[str]:
    """The ways to say it, the shortest first; the middle goes without saying, too."""
    places = [f"at the {scene.place} "]
    if scene.place == "middle":
        places = ["", "in the middle "]
    backgrounds = [scene.background, f"a {scene.background} background"]
    size = scene.size and f"{scene.size} "
    for place, article, background in product(places, ("", "a "), backgrounds):
        yield f"{article}{size}{scene.colour} {scene.shape} {place}on {background}"


def inside(shape: str, u: Any, v: Any) -> Any:
    """Whether points lie in a shape that fills the square -1…1; u to the right, v down."""
    u_abs, v_abs, radius_squared = abs(u), abs(v), u * u + v * v
    square = (u_abs <= 1) & (v_abs <= 1)
    if shape == "square":
        return square
    if shape == "circle":
        return radius_squared <= 1
    if shape == "ring":
        return (radius_squared <= 1) & (radius_squared >= 0.3)
    if shape == "triangle":
        return square & (2 * u_abs <= v + 1)
    if shape == "cross":
        return square & ((u_abs <= 0.3) | (v_abs <= 0.3))
    raise ValueError(f"shape {shape!r}: expected one of {', '.join(SHAPES)}")
