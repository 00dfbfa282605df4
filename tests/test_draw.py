"""Maps on pictures: normalization, placement, overlays, and sheets of panels."""

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import ImageFont
from torch.nn import functional

from vitrail.config.settings import Colormap
from vitrail.data.pictures import Fit, fit_picture, seen_box
from vitrail.errors import ConfigError
from vitrail.explain import draw
from vitrail.explain.draw import (
    Panel,
    compose,
    cut,
    dim,
    drawable,
    limits,
    line_height,
    load_font,
    mark_patch,
    normalize,
    overlay,
    place,
    show,
    shown_box,
    wrap,
)

RANDOM = np.random.default_rng(8)
MAPS_FGJ = np.array([[[1.0, 3.0, 2.0]], [[5.0, 9.0, 6.0]], [[4.0, 4.0, 4.0]]])
SIZES = [
    ((37, 91), (20, 28)),
    ((91, 37), (20, 28)),
    ((60, 84), (20, 28)),
    ((77, 150), (32, 32)),
    ((251, 64), (31, 17)),
    ((13, 11), (32, 32)),
]


def ramps(height: int, width: int) -> np.ndarray:
    """A picture that knows its columns (red) and rows (green), counted to 255."""
    picture_HWC = np.full((height, width, 3), 200, dtype=np.uint8)
    picture_HWC[:, :, 0] = np.arange(width)
    picture_HWC[:, :, 1] = np.arange(height)[:, None]
    return picture_HWC


@pytest.mark.parametrize(("picture_hw", "size_hw"), SIZES)
@pytest.mark.parametrize("fit", get_args(Fit))
def test_the_box_is_where_fitting_takes_its_pixels(
    picture_hw: tuple[int, int], size_hw: tuple[int, int], fit: Fit
) -> None:
    fitted_HWC = fit_picture(ramps(*picture_hw), size_hw, fit).astype(float)
    left, top, right, bottom = seen_box(picture_hw, size_hw, fit)
    inside_HW = fitted_HWC[:, :, 2] == 200  # not the black of padding
    for channel, (start, end), axis in ((0, (left, right), 1), (1, (top, bottom), 0)):
        step = (end - start) / size_hw[axis]
        at = start + (np.arange(size_hw[axis]) + 0.5) * step - 0.5  # picture pixel of each center
        at_HW = np.broadcast_to(at[:, None] if axis == 0 else at, size_hw)
        # Antialiasing keeps a ramp as it is, but for the picture's own edges.
        free_HW = inside_HW & (at_HW > step) & (at_HW < picture_hw[axis] - 1 - step)
        assert free_HW.any()
        assert np.abs(fitted_HWC[:, :, channel] - at_HW)[free_HW].max() <= 0.51
    if fit == "pad":
        rows_H = within(top, bottom, picture_hw[0], size_hw[0])
        columns_W = within(left, right, picture_hw[1], size_hw[1])
        assert np.array_equal(inside_HW, rows_H[:, None] & columns_W)


def within(start: float, end: float, length: int, cells: int) -> np.ndarray:
    centers = start + (np.arange(cells) + 0.5) * (end - start) / cells
    inside: np.ndarray = (centers > 0) & (centers < length)
    return inside


def test_the_box_of_what_fits_is_the_picture() -> None:
    for fit in get_args(Fit):
        assert seen_box((20, 28), (20, 28), fit) == (0, 0, 28, 20)
    assert seen_box((90, 70), (20, 28), "squash") == (0, 0, 70, 90)
    assert seen_box((900, 1200), (32, 32), "crop") == (150, 0, 1050, 900)
    assert seen_box((900, 1200), (32, 32), "pad") == (0, -150, 1200, 1050)
    assert seen_box((1, 1000), (32, 32), "pad")[1::2] == (-16, 16)  # one row of the model's


def test_each_normalization() -> None:
    assert normalize(MAPS_FGJ, "frame").tolist() == [
        [[0, 1, 0.5]],
        [[0, 1, 0.25]],
        [[0, 0, 0]],
    ]
    assert normalize(MAPS_FGJ, "picture").tolist() == [
        [[0, 0.25, 0.125]],
        [[0.5, 1, 0.625]],
        [[0.375, 0.375, 0.375]],
    ]
    assert normalize(MAPS_FGJ / 4 - 0.5, "none").tolist() == [
        [[0, 0.25, 0]],
        [[0.75, 1, 1]],
        [[0.5, 0.5, 0.5]],
    ]
    low_F, high_F = limits(MAPS_FGJ, "frame")
    assert (low_F.tolist(), high_F.tolist()) == ([1, 5, 4], [3, 9, 4])
    assert [bound.tolist() for bound in limits(MAPS_FGJ, "picture")] == [[1] * 3, [9] * 3]
    assert [bound.tolist() for bound in limits(MAPS_FGJ, "none")] == [[0] * 3, [1] * 3]


@pytest.mark.parametrize("picture_hw", [(20, 28), (97, 131), (5, 3)])
def test_placing_a_squashed_map_is_torchs_bilinear(picture_hw: tuple[int, int]) -> None:
    map_GJ = RANDOM.random((5, 7), dtype=np.float32)
    expected = functional.interpolate(
        torch.from_numpy(map_GJ)[None, None], picture_hw, mode="bilinear"
    )
    placed_HW = place(map_GJ, picture_hw, (20, 28), "squash")
    assert placed_HW.dtype == np.float32
    assert np.allclose(placed_HW, expected[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("fit", get_args(Fit))
@pytest.mark.parametrize("picture_hw", [(900, 1200), (1200, 700)])
def test_a_spot_stays_on_its_patch_through_fit_and_place(
    picture_hw: tuple[int, int], fit: Fit
) -> None:
    """A white spot of the photo is white in one patch, and that patch's map covers it."""
    grid_GJ, patch, query = (5, 7), 4, (2, 4)
    model_hw = (grid_GJ[0] * patch, grid_GJ[1] * patch)
    left, top, right, bottom = shown_box(picture_hw, model_hw, fit, picture_hw)
    height, width = (bottom - top) / grid_GJ[0], (right - left) / grid_GJ[1]
    y, x = top + (query[0] + 0.5) * height, left + (query[1] + 0.5) * width
    photo_HWC = np.zeros((*picture_hw, 3), dtype=np.uint8)
    photo_HWC[round(y - height / 4) : round(y + height / 4),
              round(x - width / 4) : round(x + width / 4)] = 255  # fmt: skip
    seen_HW = fit_picture(photo_HWC, model_hw, fit)[:, :, 0].astype(float)
    light_GJ = seen_HW.reshape(grid_GJ[0], patch, grid_GJ[1], patch).sum(axis=(1, 3))
    assert light_GJ[query] == light_GJ.sum() > 0

    map_HW = place(light_GJ / light_GJ.max(), picture_hw, model_hw, fit)
    rows, columns = np.nonzero(np.nan_to_num(map_HW) > 0.99)
    assert abs(rows.mean() + 0.5 - y) < 1
    assert abs(columns.mean() + 0.5 - x) < 1


def test_regions_outside_the_models_input_have_no_value() -> None:
    map_GJ = np.ones((4, 4))
    cropped_HW = place(map_GJ, (90, 120), (32, 32), "crop")
    assert np.isnan(cropped_HW[:, :15]).all()
    assert np.isnan(cropped_HW[:, 105:]).all()
    assert (cropped_HW[:, 15:105] == 1).all()
    for fit in ("pad", "squash"):
        assert (place(map_GJ, (90, 120), (32, 32), fit) == 1).all()


def test_the_box_does_not_change_with_the_size_shown() -> None:
    # The model saw 5 of its 9 columns; fitting the reduced picture would make them 6.
    assert shown_box((404, 246), (9, 9), "pad", (101, 62)) == pytest.approx((-24.8, 0, 86.8, 101))
    assert shown_box((404, 268), (9, 9), "crop", (101, 67)) == (0, 17, 67, 84)
    map_GJ = RANDOM.random((3, 3))
    read_HW = place(map_GJ, (404, 268), (9, 9), "pad")
    shown_HW = place(map_GJ, (404, 268), (9, 9), "pad", shown_hw=(101, 67))
    assert np.abs(read_HW.reshape(101, 4, 67, 4).mean(axis=(1, 3)) - shown_HW).max() < 0.01


def test_overlays_show_the_color_where_the_map_is_high_and_the_picture_where_low() -> None:
    picture_HWC = np.full((1, 4, 3), 100, dtype=np.uint8)
    picture_HWC[0, 3] = (255, 0, 0)
    map_HW = np.array([[0, 1, np.nan, np.nan]], dtype=np.float32)
    low, high, gray, red = overlay(picture_HWC, map_HW, colormap="viridis", alpha=0.5)[0].tolist()
    assert low == [84, 50, 92]  # half of (68, 1, 84) over gray 100
    assert high == [215, 198, 52]  # three quarters of (253, 231, 37)
    assert gray == [187] * 3  # veiled
    assert len(set(red)) == 1  # and without color
    assert overlay(picture_HWC, map_HW, alpha=0)[0, 1].tolist() == [100] * 3
    assert overlay(picture_HWC, map_HW, alpha=1, colormap="viridis")[0, 0].tolist() == [68, 1, 84]


@pytest.mark.parametrize("colormap", get_args(Colormap))
def test_color_maps_rise_evenly_in_lightness(colormap: str) -> None:
    table = draw.colormap_bytes(colormap) / 255
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    lightness = np.cbrt(linear @ (0.2126, 0.7152, 0.0722))
    steps = np.diff(lightness[8:])
    assert table.shape == (256, 3)
    assert steps.mean() > 0.001
    assert (steps > -0.003).all()


def test_refuses_an_unknown_color_map_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'virids' \(did you mean 'viridis'\?\): one of"):
        draw.colormap_bytes("virids")
    with pytest.raises(ConfigError, match="no color map 'jet'"):
        overlay(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1)), colormap="jet")


def test_dimming_multiplies() -> None:
    picture_HWC = np.array([[[200, 100, 50]] * 3], dtype=np.uint8)
    dimmed_HWC = dim(picture_HWC, np.array([[1, 0.5, np.nan]]))
    assert dimmed_HWC[0].tolist() == [[200, 100, 50], [100, 50, 25], [0, 0, 0]]


def test_marks_the_query_on_its_patch() -> None:
    shown_HWC = np.full((100, 140, 3), 90, dtype=np.uint8)
    marked_HWC = mark_patch(shown_HWC, (1, 3), (5, 7), (0, 0, 140, 100))
    white_HW = (marked_HWC == 255).all(axis=2)
    rows, columns = np.nonzero(white_HW)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 60, 79)
    assert not white_HW[25:35, 65:75].any()
    assert (marked_HWC[18, 58:82] == 0).all()
    assert (shown_HWC == 90).all()
    mark_patch(shown_HWC, (0, 0), (99, 99), (-5.0, -5.0, 9.0, 9.0))  # smaller than a pixel, outside


@pytest.mark.parametrize(
    ("size", "columns", "largest", "shown"),
    [
        ((32, 32), 1, 1200, (384, 384)),
        ((20, 28), 2, 1200, (280, 392)),
        ((32, 32), 3, 1200, (288, 288)),
        ((32, 32), 7, 1200, (224, 224)),
        ((32, 32), 1, 100, (96, 96)),
        ((200, 160), 7, 1200, (200, 160)),
        ((600, 800), 2, 1200, (600, 800)),
        ((1500, 2000), 1, 1200, (900, 1200)),
        ((900, 1200), 4, 1200, (450, 600)),
        ((900, 1200), 20, 1200, (168, 224)),
        ((900, 1200), 2, 420, (315, 420)),
        ((1, 4000), 1, 1200, (1, 1200)),
    ],
)
def test_shows_small_pictures_large_and_large_ones_no_larger_than_the_sheet(
    size: tuple[int, int], columns: int, largest: int, shown: tuple[int, int]
) -> None:
    picture_HWC = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
    shown_HWC = show(picture_HWC, columns=columns, largest=largest)
    assert shown_HWC.shape == (*shown, 3)
    assert np.array_equal(show(shown_HWC, columns=columns, largest=largest), shown_HWC)
    times = shown[0] // size[0]
    if times > 1:  # every pixel a square
        assert np.array_equal(shown_HWC[::times, ::times], picture_HWC)
        assert np.array_equal(shown_HWC[times - 1 :: times, times - 1 :: times], picture_HWC)


def test_the_panels_stand_unchanged_in_a_grid() -> None:
    pictures = RANDOM.integers(0, 256, (2, 3, 300, 290, 3), dtype=np.uint8)
    grid = [[Panel(picture_HWC) for picture_HWC in row] for row in pictures]
    sheet_HWC = np.array(compose(grid))
    margin, gap = 17, 7  # letters of 290 / 21 = 14 pixels
    assert sheet_HWC.shape == (2 * 300 + gap + 2 * margin, 3 * 290 + 2 * gap + 2 * margin, 3)
    for g in range(2):
        for j in range(3):
            y, x = margin + g * (300 + gap), margin + j * (290 + gap)
            assert np.array_equal(sheet_HWC[y : y + 300, x : x + 290], pictures[g, j])


def test_titles_caption_and_bar_add_only_around_the_panels() -> None:
    picture_HWC = RANDOM.integers(0, 256, (400, 500, 3), dtype=np.uint8)
    plain = compose([[Panel(picture_HWC)]])
    bar = ("magma", 0.0, 0.03125, "attention")
    parts = {"title": compose([[Panel(picture_HWC, "cat.png")]]),
             "caption": compose([[Panel(picture_HWC)]], caption="cat 93.2%\nrollout"),
             "colorbar": compose([[Panel(picture_HWC)]], colorbar=bar),
             "row title": compose([[Panel(picture_HWC)]], row_titles=["layer 1"])}  # fmt: skip
    for name, sheet in parts.items():
        wider = (sheet.width > plain.width, sheet.height > plain.height)
        assert wider == ((True, False) if name == "row title" else (False, True)), name
    drawn_HWC = np.array(parts["colorbar"])[plain.height :]
    for color in draw.colormap_bytes("magma")[[3, 128, 252]].astype(int):
        assert np.abs(drawn_HWC.astype(int) - color).sum(axis=2).min() < 12


def test_panels_do_not_move_with_the_texts() -> None:
    """Frames of an animation differ in their titles and captions, never in where panels stand."""
    picture_HWC = RANDOM.integers(0, 256, (300, 384, 3), dtype=np.uint8)
    sheets = [
        np.array(compose([[Panel(picture_HWC, title)]], caption=caption))
        for title, caption in (
            ("a", "cat 93.2%"),
            ("Ägypten " * 30, "word " * 80),
            ("gqÅ", "x\ny"),
        )
    ]
    places = [np.nonzero((sheet == picture_HWC[0, 0]).all(axis=2)) for sheet in sheets]
    assert len({(rows[0], columns[0]) for rows, columns in places}) == 1
    assert len({sheet.shape[1] for sheet in sheets}) == 1


def test_the_color_bar_does_not_move_with_its_values() -> None:
    """Nor does the sheet's size, whatever the numbers."""
    picture_HWC = np.zeros((384, 384, 3), np.uint8)
    panels = [Panel(picture_HWC), Panel(picture_HWC)]
    sheets = [
        np.array(compose([panels], colorbar=("viridis", low, high, "each map on its own scale")))
        for low, high in ((0.0108, 0.0413), (0.00953, 0.5), (0, 1), (-1.234e-12, 1.234e12))
    ]
    bright = draw.colormap_bytes("viridis")[200]
    places = [np.nonzero((abs(s.astype(int) - bright) < 3).all(axis=2)) for s in sheets]
    assert places[0][0].size
    assert (
        len({(tuple(map(tuple, place)), s.shape) for place, s in zip(places, sheets, strict=True)})
        == 1
    )


def test_panels_of_several_sizes_share_a_sheet() -> None:
    rows = [
        [Panel(np.zeros((30, 20, 3), np.uint8), "one"), Panel(np.zeros((500, 400, 3), np.uint8))],
        [Panel(np.zeros((9, 900, 3), np.uint8))],
    ]
    sheet = compose(rows, caption="a", colorbar=("cividis", -1e-7, 12345.678, "long " * 90))
    assert sheet.width >= 1800


# Text


def test_letters_that_cannot_be_drawn_become_the_replacement_sign() -> None:
    assert drawable("Žába 93% · … ж α") == "Žába 93% · … ж α"
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
