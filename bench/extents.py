"""What is made, in pixels and frames: ``1024`` is a square picture, ``832x480x81`` a video."""

from dataclasses import dataclass

from tp_runtime.models.family import Family
from tp_runtime.sharding.parts import Shape


@dataclass(frozen=True)
class Extent:
    """Width and height in pixels, and frames."""

    width: int
    height: int
    frames: int = 1

    @classmethod
    def parse(cls, text: str) -> "Extent":
        """``1024``, ``1280x704`` or ``832x480x81``. Raises ValueError."""
        numbers = [int(number) for number in text.split("x")]
        if len(numbers) > 3 or min(numbers) < 1:
            raise ValueError(f"{text!r} is no size: give 1024, or 832x480x81 for 81 frames")
        return cls(*numbers) if len(numbers) > 1 else cls(numbers[0], numbers[0])

    @classmethod
    def usual(cls, family: Family) -> list["Extent"]:
        """The family's own, the smaller one first."""
        return [cls(*extent) for extent in family.extents]

    @property
    def side(self) -> int | str:
        """What stands for it in rows: the side of a square picture, else as it is parsed."""
        if self.frames == 1 and self.width == self.height:
            return self.width
        return "x".join(map(str, (self.width, self.height, self.frames)))

    def __str__(self) -> str:
        if self.frames == 1 and self.width == self.height:
            return f"{self.width}²"
        return f"{self.width} x {self.height} x {self.frames}"

    def latent_shape(self, family: Family) -> Shape:
        """Of what is sampled by the published model."""
        return family.published.geometry.latent_shape(self.width, self.height, self.frames)
