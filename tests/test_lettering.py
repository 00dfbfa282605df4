"""Text on pictures: what can be drawn, and how it fits a width."""

from PIL import ImageFont

from vitrail.explain.text import cut, drawable, line_height, load_font, wrap


def test_letters_that_cannot_be_drawn_become_the_replacement_sign() -> None:
    assert drawable("Žába 93 % · … ж α") == "Žába 93 % · … ж α"
    assert drawable("a\x00b\u202ec\n\U0001f98ad 漢") == "a�b�c��d �"
    font = load_font(17)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert font.getlength("�") > 0


def test_long_words_are_cut_and_lines_wrapped() -> None:
    font = load_font(15)
    assert cut("cat", font, 300) == "cat"
    short = cut("a" * 200, font, 120)
    assert short.endswith("…")
    assert 100 < font.getlength(short) <= 120
    assert cut("cat", font, 1) == "…"
    lines = wrap("the quick brown fox\x07 jumps over " + "z" * 99, font, 130)
    assert " ".join(lines[:-1]) == "the quick brown fox� jumps over"
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 130 for line in lines)
    assert line_height(font) >= 15
