"""Maps over pictures, sheets of panels, and animations, read back as pixels."""

import dataclasses
import io
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from torch.nn import functional

from vitrail.config.drawing import Colormap, Look
from vitrail.config.settings import FitMode, ModelConfig
from vitrail.data.pictures import Fit, fit_picture, seen_box
from vitrail.errors import ConfigError, OutputError
from vitrail.evaluation.report import drawable
from vitrail.explain.animation import encode_animation
from vitrail.explain.draw import draw_animation, draw_frames, draw_sheet, save
from vitrail.explain.explanation import Explanation, Frame, Subject
from vitrail.explain.map_settings import MapSettings
from vitrail.explain.panels import drawn_size, make_legends, scales, show_map
from vitrail.model.vit import VisionTransformer

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


def rendered(figure: Figure) -> np.ndarray:
    """The figure's pixels (H, W, C)."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def shown(picture_HWC: np.ndarray, map_GJ: np.ndarray | None = None, **options: Any) -> np.ndarray:
    """A picture with a map over it, pixel by pixel."""
    height, width = picture_HWC.shape[:2]
    figure = Figure((width / 72, height / 72), dpi=72)
    options = {"look": Look(), **options}
    show_map(figure.add_axes((0, 0, 1, 1)), picture_HWC, map_GJ, **options)
    return rendered(figure)


def picture(height: int, width: int) -> np.ndarray:
    """A picture of many colors: soft ramps, a bright disc and a little noise."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.04) * 90
    channels = [200 * x + 20, 230 * y + 10 + disc, 240 - 200 * x * y]
    noise = RANDOM.normal(0, 3, (height, width, 3))
    return (np.stack(channels, axis=-1) + noise).clip(0, 255).astype(np.uint8)


def explained(
    maps_FGJ: np.ndarray, picture_HWC: np.ndarray, *, name: str = "x.png", **changes: Any
) -> Explanation:
    """An explanation of given maps: through layer 1, 2, ..."""
    rows, columns = maps_FGJ.shape[1:]
    config = ModelConfig(
        image_size=(4 * rows, 4 * columns), patch_size=4, n_classes=3, embed_dim=8, n_layers=1,
        n_attention_heads=1,
    )  # fmt: skip
    raw_HWC = fit_picture(picture_HWC, config.image_hw, "squash")
    subject = Subject(
        VisionTransformer(config).eval(), torch.zeros(1, 3, *config.image_hw), raw_HWC, picture_HWC,
        "squash", ("a", "b", "c"), name,
    )  # fmt: skip
    frames = tuple(
        Frame(map_GJ, f"through layer {layer}", "cat 93.2%")
        for layer, map_GJ in enumerate(maps_FGJ, 1)
    )
    made = Explanation(subject, MapSettings(method="rollout"), "rollout", frames, 0)
    return dataclasses.replace(made, **changes)


def moving(n_frames: int, picture_HWC: np.ndarray) -> Explanation:
    """A map that moves over the picture."""
    columns_GJ = np.mgrid[:5, :7][1]
    maps = [np.exp(-((columns_GJ - frame) ** 2) / 4) for frame in range(n_frames)]
    return explained(np.stack(maps), picture_HWC)


def ramps(height: int, width: int) -> np.ndarray:
    """A picture that knows its columns (red) and rows (green), counted to 255."""
    picture_HWC = np.full((height, width, 3), 200, dtype=np.uint8)
    picture_HWC[:, :, 0] = np.arange(width)
    picture_HWC[:, :, 1] = np.arange(height)[:, None]
    return picture_HWC


@pytest.mark.parametrize(("picture_hw", "size_hw"), SIZES)
@pytest.mark.parametrize("fit", get_args(FitMode))
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
    for fit in get_args(FitMode):
        assert seen_box((20, 28), (20, 28), fit) == (0, 0, 28, 20)
    assert seen_box((90, 70), (20, 28), "squash") == (0, 0, 70, 90)
    assert seen_box((900, 1200), (32, 32), "crop") == (150, 0, 1050, 900)
    assert seen_box((900, 1200), (32, 32), "pad") == (0, -150, 1200, 1050)
    assert seen_box((1, 1000), (32, 32), "pad")[1::2] == (-16, 16)  # one row of the model's


# Maps over pictures


def test_each_normalization() -> None:
    def scaled(maps_FGJ: np.ndarray, how: str) -> list[object]:
        norms = scales(maps_FGJ, Look(normalize=how))
        return [norm(map_GJ).tolist() for norm, map_GJ in zip(norms, maps_FGJ, strict=True)]

    assert scaled(MAPS_FGJ, "frame") == [[[0, 1, 0.5]], [[0, 1, 0.25]], [[0, 0, 0]]]
    assert scaled(MAPS_FGJ, "picture") == [
        [[0, 0.25, 0.125]], [[0.5, 1, 0.625]], [[0.375, 0.375, 0.375]],
    ]  # fmt: skip
    assert scaled(MAPS_FGJ / 4 - 0.5, "none") == [[[0, 0.25, 0]], [[0.75, 1, 1]], [[0.5, 0.5, 0.5]]]


@pytest.mark.parametrize("picture_hw", [(20, 28), (97, 131), (500, 300)])
def test_a_map_is_enlarged_as_torchs_bilinear(picture_hw: tuple[int, int]) -> None:
    """In style reference, white x map is the map itself."""
    map_GJ = RANDOM.random((5, 7), dtype=np.float32)
    expected = functional.interpolate(
        torch.from_numpy(map_GJ)[None, None], picture_hw, mode="bilinear"
    )
    white_HWC = np.full((*picture_hw, 3), 255, np.uint8)
    look, norm = (
        Look(style="reference", normalize="none"),
        scales(map_GJ[None], Look(normalize="none")),
    )
    drawn_HWC = shown(white_HWC, map_GJ, look=look, norm=norm[0])
    assert np.abs(drawn_HWC[:, :, 0] / 255 - expected[0, 0].numpy()).max() < 0.02


@pytest.mark.parametrize("fit", get_args(FitMode))
@pytest.mark.parametrize("picture_hw", [(450, 600), (600, 350)])
def test_a_spot_stays_on_its_patch_through_fit_and_drawing(
    picture_hw: tuple[int, int], fit: Fit
) -> None:
    """What is white in the photo is white in one patch, and that patch's map lies on it again."""
    grid_GJ, patch, query = (5, 7), 4, (2, 4)
    model_hw = (grid_GJ[0] * patch, grid_GJ[1] * patch)
    left, top, right, bottom = box = seen_box(picture_hw, model_hw, fit)
    height, width = (bottom - top) / grid_GJ[0], (right - left) / grid_GJ[1]
    y, x = top + (query[0] + 0.5) * height, left + (query[1] + 0.5) * width
    photo_HWC = np.zeros((*picture_hw, 3), dtype=np.uint8)
    photo_HWC[round(y - height / 4) : round(y + height / 4),
              round(x - width / 4) : round(x + width / 4)] = 255  # fmt: skip
    seen_HW = fit_picture(photo_HWC, model_hw, fit)[:, :, 0].astype(float)
    light_GJ = seen_HW.reshape(grid_GJ[0], patch, grid_GJ[1], patch).sum(axis=(1, 3))
    assert light_GJ[query] == light_GJ.sum() > 0

    white_HWC = np.full_like(photo_HWC, 255)
    drawn_HWC = shown(white_HWC, light_GJ, look=Look(style="reference"), box=box)
    if fit == "crop":  # beyond the box there is no map: the picture stays white
        drawn_HWC[: round(top)] = drawn_HWC[round(bottom) :] = 0
        drawn_HWC[:, : round(left)] = drawn_HWC[:, round(right) :] = 0
    rows, columns = np.nonzero(drawn_HWC[:, :, 0] > 245)
    assert abs(rows.mean() + 0.5 - y) < 2
    assert abs(columns.mean() + 0.5 - x) < 2


def test_maps_show_the_color_where_high_and_the_picture_where_low() -> None:
    picture_HWC = np.full((1, 2, 3), 100, dtype=np.uint8)
    map_GJ = np.array([[0.0, 1.0]])
    low, high = shown(picture_HWC, map_GJ, look=Look(colormap="viridis", alpha=0.5))[0]
    assert np.abs(low - (84, 50, 92)).max() <= 1  # half of (68, 1, 84) over gray 100
    assert np.abs(high - (215, 198, 52)).max() <= 1  # three quarters of (253, 231, 37)
    bare = shown(picture_HWC, map_GJ, look=Look(alpha=0))
    assert np.abs(bare - 100).max() <= 1
    full = shown(picture_HWC, map_GJ, look=Look(colormap="viridis", alpha=1))
    assert np.abs(full[0, 0] - (68, 1, 84)).max() <= 1


def test_what_the_model_did_not_see_is_veiled_and_gray() -> None:
    red_HWC = np.zeros((30, 40, 3), np.uint8)
    red_HWC[:, :, 0] = 255
    drawn_HWC = shown(red_HWC, np.ones((4, 4)), box=(5, 0, 35, 30))
    assert np.ptp(drawn_HWC[:, :5], axis=2).max() == 0
    assert drawn_HWC[0, 2, 0] == drawn_HWC[0, 38, 0] > 170
    assert np.ptp(drawn_HWC[:, 5:35], axis=2).min() > 0


def test_the_reference_style_multiplies() -> None:
    picture_HWC = np.array([[[200, 100, 50]] * 3], dtype=np.uint8)
    drawn_HWC = shown(picture_HWC, np.array([[1, 0.5, 0]]), look=Look(style="reference"))
    assert np.abs(drawn_HWC[0] - [[200, 100, 50], [100, 50, 25], [0, 0, 0]]).max() <= 1


@pytest.mark.parametrize("colormap", get_args(Colormap))
def test_color_maps_rise_evenly_in_lightness(colormap: str) -> None:
    table = matplotlib.colormaps[colormap](np.arange(256))[:, :3]
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    lightness = np.cbrt(linear @ (0.2126, 0.7152, 0.0722))
    steps = np.diff(lightness[8:])
    assert steps.mean() > 0.001
    assert (steps > -0.003).all()


# Sheets


@pytest.mark.parametrize(
    ("size", "columns", "drawn"),
    [
        ((32, 32), 1, (384, 384)),
        ((20, 28), 2, (280, 392)),
        ((32, 32), 4, (320, 320)),
        ((32, 32), 7, (160, 160)),
        ((200, 160), 7, (182, 146)),
        ((450, 600), 2, (450, 600)),
        ((1500, 2000), 1, (900, 1200)),
        ((900, 1200), 4, (240, 320)),
        ((900, 1200), 20, (48, 64)),
        ((1, 4000), 1, (1, 1200)),
    ],
)
def test_small_pictures_are_drawn_large_and_large_ones_no_larger_than_the_sheet(
    size: tuple[int, int], columns: int, drawn: tuple[int, int]
) -> None:
    assert drawn_size(size, columns) == drawn


def find(sheet_HWC: np.ndarray, picture_HWC: np.ndarray) -> tuple[int, int]:
    """Where a picture stands on a sheet, pixel by pixel."""
    height, width = picture_HWC.shape[:2]
    corners = (sheet_HWC == picture_HWC[0, 0]).all(axis=2)
    for y, x in zip(*np.nonzero(corners), strict=True):
        if np.array_equal(sheet_HWC[y : y + height, x : x + width], picture_HWC):
            return int(y), int(x)
    raise AssertionError("it is not there")


@pytest.mark.parametrize("size", [(300, 290), (30, 29)])
def test_the_picture_stands_unchanged_on_the_sheet(size: tuple[int, int]) -> None:
    picture_HWC = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
    sheet_HWC = rendered(draw_sheet(explained(RANDOM.random((5, 2, 3)), picture_HWC), Look()))
    times = drawn_size(size, 3)[0] // size[0]
    find(sheet_HWC, picture_HWC.repeat(times, axis=0).repeat(times, axis=1))


def test_nothing_moves_with_the_words() -> None:
    """Frames of an animation differ in titles, predictions and values, not in their places."""
    picture_HWC = RANDOM.integers(0, 256, (300, 384, 3), dtype=np.uint8)
    frames = (
        Frame(RANDOM.random((2, 3)), "a", "cat 93.2%"),
        Frame(1e-9 * RANDOM.random((2, 3)), "Ägypten " * 30, "word " * 80),
        Frame(1e9 * RANDOM.random((2, 3)), "gqÅ", "x"),
    )
    made = explained(np.zeros((1, 2, 3)), picture_HWC, frames=frames)
    drawn = [np.asarray(frame).astype(int) for frame in draw_frames(made, Look())]
    assert len({frame.shape for frame in drawn}) == 1
    assert len({find(frame, picture_HWC) for frame in drawn}) == 1
    bar_HWC = matplotlib.colormaps["magma"](np.arange(0, 256, 51), bytes=True)[:, :3]
    below = [frame[find(frame, picture_HWC)[0] + 300 :] for frame in drawn]
    for color in bar_HWC.astype(int)[1:]:
        places = [np.nonzero((np.abs(part - color) < 5).all(axis=2)) for part in below]
        assert len({tuple(map(tuple, place)) for place in places}) == 1
        assert places[0][0].size


def test_the_query_is_outlined_on_its_patch() -> None:
    gray_HWC = np.full((100, 140, 3), 90, dtype=np.uint8)
    frames = (Frame(np.zeros((5, 7)), "a", "cat", query=(1, 3)),)
    (frame,) = draw_frames(explained(np.zeros((1, 5, 7)), gray_HWC, frames=frames), Look())
    drawn_HWC = np.asarray(frame).astype(int)
    rows, columns = np.nonzero((drawn_HWC == 90).all(axis=2))
    top, left = rows.min(), columns.min()  # drawn three times as large
    panel_HWC = drawn_HWC[top : top + 300, left : left + 420]
    white = np.nonzero((panel_HWC == 255).all(axis=2))
    assert [round((white[axis].min() + white[axis].max()) / 2) for axis in (0, 1)] == [90, 210]
    assert abs(white[0].min() - 60) < 3
    assert abs(white[1].max() - 240) < 3
    assert (panel_HWC == 0).all(axis=2).any()
    assert (panel_HWC[75:105, 195:225] == 90).all()


def test_a_sheet_has_a_row_title_for_each_row_of_a_grid() -> None:
    maps_FGJ, picture_HWC = RANDOM.random((6, 2, 3)), picture(60, 90)
    grid = {"kind": "heads", "columns": 3}
    with_titles = draw_sheet(
        explained(maps_FGJ, picture_HWC, **grid, row_titles=("layer 1", "layer 2")), Look()
    )
    words = [text.get_text() for text in with_titles.texts]
    assert words[:2] == ["layer 1", "layer 2"]
    assert len(with_titles.axes) == 1 + 6 + 1  # the picture, the maps, the color bar


def test_words_that_cannot_be_drawn_and_long_ones() -> None:
    assert drawable("Žába 93% · … ж α ✓", 99) == "Žába 93% · … ж α ✓"
    assert drawable("a\x00b\u202ec\n\U0001f98ad 漢", 99) == "a�b�c��d �"
    assert drawable("a" * 200, 20) == "a" * 19 + "…"
    made = explained(RANDOM.random((1, 2, 3)), picture(60, 90), name="$x^2$ \n 漢" * 9999)
    assert draw_sheet(made, Look()).get_size_inches()[1] * 72 < 1500


# Animations


def read_back(content: bytes) -> tuple[np.ndarray, list[int]]:
    """The frames' pixels (F, H, W, C), and how long each is shown."""
    with Image.open(io.BytesIO(content)) as opened:
        pairs = [
            (np.array(frame.convert("RGB")).astype(int), frame.info["duration"])
            for frame in ImageSequence.Iterator(opened)
        ]
    return np.stack([pixels for pixels, _ in pairs]), [duration for _, duration in pairs]


def blurred(frame_HWC: np.ndarray) -> np.ndarray:
    """Means of 8 x 8 pixels: what the eye makes of dither."""
    height, width = (8 * (side // 8) for side in frame_HWC.shape[:2])
    means: np.ndarray = (
        frame_HWC[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
    )
    return means


def test_a_gif_keeps_still_what_is_still_and_shows_gradients() -> None:
    frames = draw_frames(moving(7, picture(285, 399)), Look())
    shown_FHWC, durations = read_back(encode_animation(frames, [500] * 7, ".gif", Look()))
    true_FHWC = np.stack([np.asarray(frame).astype(int) for frame in frames])
    assert shown_FHWC.shape == true_FHWC.shape
    assert durations == [500] * 7

    still_HW = (true_FHWC == true_FHWC[0]).all(axis=(0, 3))
    assert still_HW[:300, :400].all()
    assert np.ptp(shown_FHWC[:, still_HW], axis=0).max() == 0
    assert (shown_FHWC[true_FHWC.min(axis=3) == 255] == 255).all()  # white stays white
    for shown_HWC, true_HWC in zip(shown_FHWC, true_FHWC, strict=True):
        assert len(np.unique(shown_HWC @ (65_536, 256, 1))) >= 150
        assert np.abs(shown_HWC - true_HWC).mean() < 5
        assert np.abs(blurred(shown_HWC) - blurred(true_HWC)).mean() < 1.5
    assert shown_FHWC[:, :, 420:].std(axis=0).max() > 20  # and what does move, moves


def test_a_gif_states_its_loop_and_duration() -> None:
    frames = draw_frames(moving(3, picture(30, 42)), Look())
    for loop in (0, 5):
        content = encode_animation(frames, [120] * 3, ".gif", Look(loop=loop))
        with Image.open(io.BytesIO(content)) as opened:
            assert opened.info.get("loop") == loop
            assert opened.n_frames == 3
        assert read_back(content)[1] == [120] * 3


def test_a_webp_is_exact() -> None:
    frames = draw_frames(moving(3, picture(30, 42)), Look())
    content = encode_animation(frames, [70, 80, 90], ".webp", Look(loop=3))
    shown_FHWC, durations = read_back(content)
    assert durations == [70, 80, 90]
    assert np.array_equal(shown_FHWC, np.stack([np.asarray(frame) for frame in frames]))
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.info["loop"] == 3


def test_an_animation_opens_on_the_bare_picture_fades_and_holds_its_last_frame() -> None:
    made = moving(3, picture(285, 399))
    frames, durations = draw_animation(made, Look(duration=100))
    assert durations == [100, *[60] * 4, 100, *[60] * 4, 100, *[60] * 4, 400]
    pixels = [np.asarray(frame).astype(int) for frame in frames]
    assert sum(np.array_equal(frame, pixels[0]) for frame in pixels) == 1
    drawn_HWC = made.subject.picture_HWC
    y, x = find(pixels[0], drawn_HWC)
    assert np.array_equal(pixels[0][y : y + 285, -x - 399 : -x], drawn_HWC)  # no map yet
    before, between, after = pixels[5], pixels[7], pixels[10]
    middle_HWC = before[y : y + 285, -x - 399 : -x] * 0.6 + after[y : y + 285, -x - 399 : -x] * 0.4
    assert np.abs(between[y : y + 285, -x - 399 : -x] - middle_HWC).max() <= 1.5
    assert np.array_equal(between[y + 290 :], after[y + 290 :])  # words do not mix
    as_there = draw_animation(made, Look(style="reference"))
    assert as_there[1] == [500] * 3


def test_a_grid_of_maps_does_not_fade() -> None:
    made = dataclasses.replace(moving(3, picture(30, 42)), kind="heads", columns=3)
    frames, durations = draw_animation(made, Look(duration=100))
    assert len(frames) == 4
    assert durations == [100, 100, 100, 400]


# Words and paper


def words_on(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def test_attention_that_is_nearly_even_is_drawn_evenly_and_says_so() -> None:
    even_GJ = 0.0156 + 1e-4 * RANDOM.random((4, 4))
    figure = draw_sheet(explained(even_GJ[None], picture(60, 60)), Look())
    assert "nearly even: the highest value is 1.0" in words_on(figure)
    (norm,) = scales(even_GJ[None], Look(), shares=True)
    assert np.abs(norm(even_GJ) - 0.5).max() < 0.05
    maps_FGJ = np.stack([even_GJ, RANDOM.random((4, 4))])
    assert "1 of 2 nearly even" in words_on(
        draw_sheet(explained(maps_FGJ, picture(60, 60)), Look())
    )
    other = explained(
        even_GJ[None], picture(60, 60), kind="single", settings=MapSettings(method="gradcam")
    )
    assert "even" not in words_on(draw_sheet(other, Look()))


def test_words_name_the_unit_the_method_and_the_file_as_they_are() -> None:
    made = explained(
        np.linspace(0.01, 0.2, 6).reshape(1, 2, 3), picture(60, 90), name="IMG_2041.JPG"
    )
    words = words_on(draw_sheet(made, Look()))
    assert "1.00% to 20.00% of the attention" in words
    assert "IMG_2041.JPG: rollout" in words
    other = dataclasses.replace(made, kind="single", settings=MapSettings(method="gradcam"))
    assert "IMG_2041.JPG: Grad-CAM" in words_on(draw_sheet(other, Look()))


def test_dark_paper_is_dark_and_words_are_light() -> None:
    made = explained(RANDOM.random((2, 2, 3)), picture(60, 90))
    for theme, paper in (("light", (255, 255, 255)), ("dark", (13, 17, 23))):
        look = Look(theme=theme)
        sheet_HWC = rendered(draw_sheet(made, look))
        assert tuple(sheet_HWC[0, 0]) == paper
        below_HWC = sheet_HWC[-150:]
        assert np.abs(below_HWC - paper).max() > 180
        frames, durations = draw_animation(made, look)
        gif_FHWC, _ = read_back(encode_animation(frames, durations, ".gif", look))
        assert (gif_FHWC[:, :8] == paper).all()  # not dithered


def test_maps_of_a_small_part_of_a_picture_are_enlarged(tmp_path: Path) -> None:
    made = explained(RANDOM.random((2, 4, 4)), picture(40, 2000))
    wide = dataclasses.replace(made, subject=dataclasses.replace(made.subject, fit="crop"))
    whole, first, second = (a.get_window_extent() for a in draw_sheet(wide, Look()).axes[:3])
    assert whole.height < 20
    assert first.height == pytest.approx(first.width) == second.height > 300


# Saving


def test_refuses_what_cannot_be_saved(tmp_path: Path) -> None:
    made, path = moving(2, picture(20, 28)), tmp_path / "a.gif"
    for duration in (0, 700_000):
        with pytest.raises(ConfigError, match=rf"duration is {duration} ms: give 10 to"):
            save(made, path, Look(duration=duration))
    for loop in (-1, 65_536):
        with pytest.raises(ConfigError, match=rf"loop is {loop}: give 0"):
            save(made, path, Look(loop=loop))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        save(made, tmp_path / "file" / "a.gif", Look())
    assert not path.exists()


# The reference implementation's frames


def test_reference_frames_show_label_layer_and_what_the_model_sees() -> None:
    made = explained(RANDOM.random((2, 5, 7)), picture(285, 399), kind="rollout")
    labeled = dataclasses.replace(made, subject=dataclasses.replace(made.subject, label="cat"))
    sheet = draw_sheet(labeled, Look(style="reference"))
    titles = [axes.get_title(loc="left") for axes in sheet.axes[:3]]
    assert titles == ["Original (cat)", "Through layer 1", "Through layer 2"]
    raw_HWC = made.subject.raw_HWC
    times = drawn_size(raw_HWC.shape[:2], 3)[0] // len(raw_HWC)
    find(rendered(sheet), raw_HWC.repeat(times, axis=0).repeat(times, axis=1))


def test_the_reference_masks_scaled_to_black_and_white_are_the_maps_so_scaled(
    reference: Path,
) -> None:
    """The reference divides each layer's rollout by its maximum before it draws it."""
    with np.load(reference / "layer3-dim32_expected.npz") as expected:
        attention_LBATT, masks_BLGJ = expected["attention"], expected["rollout"]
    for image in range(attention_LBATT.shape[1]):
        flow_TT = np.eye(attention_LBATT.shape[-1])
        for layer, attention_ATT in enumerate(attention_LBATT[:, image]):
            mixed_TT = attention_ATT.mean(axis=0) + np.eye(len(flow_TT))
            flow_TT = mixed_TT / mixed_TT.sum(axis=1, keepdims=True) @ flow_TT
            flow_GJ, mask_GJ = (
                flow_TT[0, 1:].reshape(masks_BLGJ.shape[2:]),
                masks_BLGJ[image, layer],
            )
            ours, theirs = (scales(x[None], Look())[0](x) for x in (flow_GJ, mask_GJ))
            assert np.abs(ours - theirs).max() < 1e-3


@pytest.mark.parametrize(
    ("highest", "words"), [(5e-5, "lowest to highest, each map"), (2.0, "1 to 2, each map")]
)
def test_a_legend_has_no_numbers_that_say_nothing(highest: float, words: str) -> None:
    map_GJ = np.array([[highest / 2, highest]])
    frame, look = Frame(map_GJ, "a", "cat 93.2%"), Look()
    (legend,) = make_legends([frame], scales([map_GJ], look, [False]), look)
    assert legend.words.startswith(words)
