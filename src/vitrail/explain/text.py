"""Text on pictures: the one font that comes with matplotlib, lines cut and wrapped to a width."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont
PAPER, INK, SOFT = "#ffffff", "#1f2328", "#656d76"
"""Ground, text, and text that is less important."""
RED, GREEN = "#b42318", "#1a7f37"
"""Text of a wrong and of a right answer; both read well on the ground."""

LONGEST = 1000
"""Characters of a text that are looked at: names come from strangers."""


def load_font(size: int, *, bold: bool = False) -> Font:
    """Return DejaVu Sans with letters of ``size`` pixels."""
    return ImageFont.truetype(font_path(bold=bold), size)


def font_path(*, bold: bool) -> str:
    """Return the font's file."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@cache
def known_characters() -> frozenset[int]:
    """Return the code points that both weights of the font can draw."""
    both = [FT2Font(font_path(bold=bold)).get_charmap() for bold in (False, True)]
    return frozenset(both[0]) & frozenset(both[1])


def drawable(text: str) -> str:
    """Return the text in one line, what cannot be drawn or seen as the replacement sign."""
    known = known_characters()
    return "".join(
        letter if letter.isprintable() and ord(letter) in known else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def cut(text: str, font: Font, width: float) -> str:
    """Return the text drawable, with … at its end where it is wider than ``width`` pixels."""
    text = drawable(text[:LONGEST])
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Break one line between words into lines of at most ``width`` pixels; cut longer words."""
    lines: list[str] = []
    for word in text[:LONGEST].split(" "):
        longer = f"{lines[-1]} {drawable(word)}" if lines else ""
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(cut(word, font, width))
    return lines


def line_height(font: Font) -> int:
    """Return the pixels from one line of text to the next."""
    return round(sum(font.getmetrics()) * 1.1)


def draw_caption(caption: str, *, width: int, size: int, ink: str = INK) -> Image.Image:
    """Draw lines below each other, the first one bold, larger and in the given color."""
    first, *others = caption.split("\n")
    bold, plain = load_font(round(size * 1.2), bold=True), load_font(max(12, round(size * 0.8)))
    lines = [(text, bold, ink) for text in wrap(first, bold, width)]
    lines += [(text, plain, SOFT) for other in others for text in wrap(other, plain, width)]
    drawn = Image.new("RGB", (width, sum(line_height(font) for _, font, _ in lines)), PAPER)
    draw, y = ImageDraw.Draw(drawn), 0
    for text, font, colour in lines:
        draw.text((0, y), text, colour, font)
        y += line_height(font)
    return drawn


def stack(blocks: Sequence[Image.Image], *, gap: int) -> Image.Image:
    """Set pictures below each other, their left edges in line."""
    height = sum(block.height for block in blocks) + gap * (len(blocks) - 1)
    stacked = Image.new("RGB", (max(block.width for block in blocks), height), PAPER)
    y = 0
    for block in blocks:
        stacked.paste(block, (0, y))
        y += block.height + gap
    return stacked
