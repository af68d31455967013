"""The pictures of the templates: a card with the model's name, over shapes as the toy draws them.

What the models really draw cannot be made on a machine without them.
"""

import colorsys
import hashlib
import random

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 640, 400
SCALE = 2  # drawn larger and made smaller: smooth edges
SHAPES = ("circle", "square", "triangle")


def card(model: str, what: str, footer: str) -> Image.Image:
    """`model` in large letters, `what` it does below, `footer` at the bottom."""
    chance = random.Random(hashlib.sha256(f"{model} {what}".encode()).digest())
    hue = int.from_bytes(hashlib.sha256(model.encode()).digest()[:2], "big") / 2**16
    width, height = SIZE[0] * SCALE, SIZE[1] * SCALE
    picture = Image.new("RGB", (width, height), _colour(hue, 0.55, 0.38))
    draw = ImageDraw.Draw(picture)
    for number in range(9):
        colour = _colour(hue + chance.uniform(-0.18, 0.18), 0.62, 0.45 + 0.055 * number)
        radius = chance.randint(40, 130) * SCALE
        x, y = chance.randint(0, width), chance.randint(0, height)
        _shape(draw, chance.choice(SHAPES), x, y, radius, colour)
    picture = picture.filter(ImageFilter.GaussianBlur(1.5 * SCALE))
    shade = Image.new("RGB", picture.size, (12, 12, 16))
    band = Image.linear_gradient("L").resize(picture.size).point(lambda v: 15 + v * 200 // 255)
    picture.paste(shade, mask=band)
    draw = ImageDraw.Draw(picture)
    margin = 36 * SCALE
    draw.text(
        (margin, 168 * SCALE), model, "white", _fitting(model, 64 * SCALE, width - 2 * margin)
    )
    draw.text((margin, 256 * SCALE), what, (235, 235, 242), _font(38 * SCALE))
    draw.text((margin, 322 * SCALE), footer, (215, 215, 224), _font(32 * SCALE))
    return picture.resize(SIZE, Image.Resampling.LANCZOS)


def _shape(
    draw: ImageDraw.ImageDraw, kind: str, x: int, y: int, radius: int, colour: tuple[int, ...]
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        draw.ellipse(box, colour)
    elif kind == "square":
        draw.rectangle(box, colour)
    else:
        draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), colour)


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return int(red * 255), int(green * 255), int(blue * 255)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
    return font


def _fitting(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    while _font(size).getlength(text) > width:
        size -= 2
    return _font(size)
