"""The check of the toy's pictures says what a drawn picture shows, and sees what is wrong."""

import pytest
import torch

from examples.shapes.check import accuracy, describe
from examples.shapes.network import Encoder, encode, encoder_weight
from examples.shapes.scenes import Scene, all_scenes, prompts
from examples.shapes.train import draw

SCENE = Scene("", "red", "circle", "top left", "blue")


def drawn(scenes: list[Scene]) -> torch.Tensor:
    """Pictures (B, 3, 128, 128)."""
    return draw(scenes, torch.Generator().manual_seed(0))


def test_it_names_what_was_drawn() -> None:
    scenes = all_scenes()[::97]
    pictures = list(drawn(scenes).movedim(1, -1).numpy())
    assert set(accuracy(pictures, scenes).values()) == {1.0}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("size", "large"),
        ("colour", "orange"),
        ("shape", "ring"),
        ("place", "top right"),
        ("background", "purple"),
    ],
)
def test_one_wrong_part_is_seen(part: str, value: str) -> None:
    (picture,) = drawn([SCENE._replace(**{part: value})]).movedim(1, -1).numpy()
    found = accuracy([picture], [SCENE])
    assert [name for name, right in found.items() if not right] == [part, "all"]


def test_nothing_is_not_something() -> None:
    assert describe(torch.full((128, 128, 3), 0.5).numpy()) is None


def test_each_scene_has_its_own_words() -> None:
    scenes = all_scenes()
    assert len({text for scene in scenes for text in prompts(scene)}) >= 4 * len(scenes)


def test_the_encoder_in_the_file_is_the_linear_one() -> None:
    pictures, weight = drawn(all_scenes()[::2500]), encoder_weight()
    torch.testing.assert_close(Encoder(weight)(pictures), encode(pictures, weight))
