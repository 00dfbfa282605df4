"""Frames -> GIF, WebP and PNG, read back by Pillow; and the reference implementation's frames."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from vitrail.errors import ConfigError, OutputError
from vitrail.explain.draw import (
    RED,
    Panel,
    compose,
    overlay,
    place,
    reference_frames,
    reference_masks,
    show,
)
from vitrail.explain.gif import quantize, save_animation, strip

RANDOM = np.random.default_rng(4)


def picture(height: int, width: int) -> np.ndarray:
    """A picture of many colors: soft ramps, a bright disc and a little noise."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.04) * 90
    channels = [200 * x + 20, 230 * y + 10 + disc, 240 - 200 * x * y]
    noise = RANDOM.normal(0, 3, (height, width, 3))
    return (np.stack(channels, axis=-1) + noise).clip(0, 255).astype(np.uint8)


def moving_frames(n_frames: int, picture_HWC: np.ndarray) -> list[Image.Image]:
    """A still panel, and beside it a map that moves over the picture."""
    shown_HWC = show(picture_HWC, columns=2, largest=250)
    frames = []
    for frame in range(n_frames):
        map_GJ = np.exp(-((np.mgrid[:5, :7][1] - frame) ** 2) / 4)
        size_hw = (shown_HWC.shape[0], shown_HWC.shape[1])
        painted_HWC = overlay(shown_HWC, place(map_GJ, size_hw, (20, 28), "squash"))
        panels = [Panel(shown_HWC, "picture"), Panel(painted_HWC, f"layer {frame + 1}")]
        frames.append(compose([panels], caption="cat 93.2%", colorbar=("magma", 0, 1, "map")))
    return frames


def read_back(path: Path) -> tuple[np.ndarray, list[int]]:
    """The frames' pixels (F, H, W, C), and how long each is shown."""
    with Image.open(path) as opened:
        pairs = [
            (np.array(frame.convert("RGB")).astype(int), frame.info["duration"])
            for frame in ImageSequence.Iterator(opened)
        ]
    return np.stack([pixels for pixels, _ in pairs]), [duration for _, duration in pairs]


def plain_frames(colors: Sequence[int | tuple[int, int, int]]) -> list[Image.Image]:
    return [Image.new("RGB", (13, 7), (c, c, c) if isinstance(c, int) else c) for c in colors]


def test_a_gif_does_not_flicker_and_uses_its_colors(tmp_path: Path) -> None:
    frames = moving_frames(7, picture(285, 399))
    save_animation(frames, tmp_path / "a.gif", durations_ms=500)
    shown_FHWC, durations = read_back(tmp_path / "a.gif")
    true_FHWC = np.stack([np.asarray(frame).astype(int) for frame in frames])
    assert shown_FHWC.shape == true_FHWC.shape
    assert durations == [500] * 7

    still_HW = (true_FHWC == true_FHWC[0]).all(axis=(0, 3))
    assert still_HW[:, :270].all()
    assert np.ptp(shown_FHWC[:, still_HW], axis=0).max() == 0  # asked for: at most 1
    for shown_HWC in shown_FHWC:
        assert len(np.unique(shown_HWC @ (65_536, 256, 1))) >= 200
    assert np.abs(shown_FHWC - true_FHWC).mean() < 2.5
    assert np.abs(shown_FHWC - true_FHWC).max() < 30
    assert (shown_FHWC[true_FHWC.min(axis=3) == 255] == 255).all()  # white stays white
    assert shown_FHWC[:, :, 290:].std(axis=0).max() > 20  # and the moving part moves


def test_a_gif_has_one_palette_and_states_its_loop(tmp_path: Path) -> None:
    frames = moving_frames(3, picture(30, 42))
    for loop, read in ((0, 0), (5, 5), (None, None)):
        save_animation(frames, tmp_path / "a.gif", durations_ms=[20, 1230, 500], loop=loop)
        with Image.open(tmp_path / "a.gif") as opened:
            assert opened.info.get("loop") == read
            assert opened.n_frames == 3
        assert read_back(tmp_path / "a.gif")[1] == [20, 1230, 500]
    assert local_palettes((tmp_path / "a.gif").read_bytes()) == [False] * 3


def local_palettes(content: bytes) -> list[bool]:
    """Whether each frame of a GIF brings its own palette, found by walking its blocks."""
    found, at = [], 13 + 768
    while content[at] != 0x3B:
        if content[at] == 0x2C:
            found.append(bool(content[at + 9] & 0x80))
        at += 11 if content[at] == 0x2C else 2
        while content[at]:
            at += content[at] + 1
        at += 1
    return found


def test_every_frame_is_kept_even_if_nothing_changed(tmp_path: Path) -> None:
    colors = [(250, 3, 7), (250, 3, 7), (0, 99, 1), (0, 99, 1), (0, 99, 1)]
    save_animation(plain_frames(colors), tmp_path / "a.gif", durations_ms=[100, 20, 30, 40, 50])
    shown_FHWC, durations = read_back(tmp_path / "a.gif")
    assert durations == [100, 20, 30, 40, 50]
    assert [tuple(frame[3, 5].tolist()) for frame in shown_FHWC] == colors
    assert (shown_FHWC == shown_FHWC[:, :1, :1]).all()


def test_few_colors_are_kept_exactly() -> None:
    colors_KC = RANDOM.permutation(64)[:60, None] * 4 + np.array([[1, 2, 3]])
    frame_HWC = colors_KC[RANDOM.integers(0, 60, (31, 41))].astype(np.uint8)
    palette_KC, (first_HW, again_HW) = quantize([frame_HWC, frame_HWC])
    assert np.array_equal(palette_KC[first_HW], frame_HWC)
    assert np.array_equal(first_HW, again_HW)


def test_a_picture_of_plain_areas_and_all_colors_fits_the_palette() -> None:
    noise_HWC = RANDOM.integers(0, 256, (300, 301, 3), dtype=np.uint8)
    for stripe in range(100):
        noise_HWC[2 * stripe : 2 * stripe + 2] = RANDOM.integers(0, 256, 3)
    palette_KC, (entries_HW,) = quantize([noise_HWC])
    assert len(palette_KC) <= 255
    assert entries_HW.max() < len(palette_KC)
    away = np.abs(palette_KC[entries_HW].astype(int) - noise_HWC)
    assert away[:200].max() <= 4
    assert away.mean() < 16


def test_a_webp_is_exact(tmp_path: Path) -> None:
    frames = moving_frames(3, picture(30, 42))
    save_animation(frames, tmp_path / "a.WEBP", durations_ms=[70, 500, 31], loop=3)
    shown_FHWC, durations = read_back(tmp_path / "a.WEBP")
    assert durations == [70, 500, 31]
    assert np.array_equal(shown_FHWC, np.stack([np.asarray(frame) for frame in frames]))
    with Image.open(tmp_path / "a.WEBP") as opened:
        assert opened.info["loop"] == 3


def test_a_png_is_a_strip_that_breaks_into_rows(tmp_path: Path) -> None:
    frames = plain_frames(range(10, 250, 20))
    save_animation(frames[:5], tmp_path / "in" / "a.png", durations_ms=500)
    with Image.open(tmp_path / "in" / "a.png") as opened:
        assert opened.size == (5 * 13, 7)
        assert [opened.getpixel((13 * i + 6, 3)) for i in range(5)] == [
            (c,) * 3 for c in range(10, 110, 20)
        ]
    wide = [frame.resize((800, 11)) for frame in frames[:7]]
    sheet = strip(wide)  # 3 fit side by side, so 7 make rows of 3, 3 and 1
    assert sheet.size == (2400, 33)
    assert sheet.getpixel((1700, 12)) == (110,) * 3
    assert sheet.getpixel((1700, 31)) == (255,) * 3
    assert strip([frame.resize((800, 11)) for frame in frames[:4]]).size == (1600, 22)
    assert strip([frame.resize((3000, 11)) for frame in frames[:2]]).size == (3000, 22)


def test_smaller_frames_stand_on_white(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 5), (200, 0, 0)), Image.new("RGB", (7, 8), (0, 0, 200))]
    save_animation(frames, tmp_path / "a.gif", durations_ms=40)
    shown_FHWC, _ = read_back(tmp_path / "a.gif")
    assert shown_FHWC.shape == (2, 8, 9, 3)
    assert shown_FHWC[0, 7, 0].tolist() == shown_FHWC[1, 0, 8].tolist() == [255] * 3
    assert shown_FHWC[1, 7, 6].tolist() == [0, 0, 200]


def test_refuses_invalid_frames_and_files(tmp_path: Path) -> None:
    frames, path = plain_frames([1, 2]), tmp_path / "a.gif"
    with pytest.raises(ConfigError, match="no frame to save"):
        save_animation([], path, durations_ms=500)
    with pytest.raises(ConfigError, match=r"a\.mp4: animations end in \.gif, \.webp or \.png"):
        save_animation(frames, tmp_path / "a.mp4", durations_ms=500)
    for durations in ([500], [500, 0], 700_000):
        with pytest.raises(ConfigError, match=r"ms for 2 frames: give each one of 10 to 655350"):
            save_animation(frames, path, durations_ms=durations)
    for loop in (-1, 65_536):
        with pytest.raises(ConfigError, match=rf"loop is {loop}: give 0"):
            save_animation(frames, path, durations_ms=500, loop=loop)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        save_animation(frames, tmp_path / "file" / "a.gif", durations_ms=500)
    assert not path.exists()


def test_reference_masks_are_the_references(reference: Path) -> None:
    with np.load(reference / "layer3-dim32_expected.npz") as expected:
        attention_LBATT, rollout_BLGJ = expected["attention"], expected["rollout"]
    for image in range(attention_LBATT.shape[1]):
        flows, flow_TT = [], np.eye(attention_LBATT.shape[-1])
        for attention_ATT in attention_LBATT[:, image]:
            mixed_TT = attention_ATT.mean(axis=0) + np.eye(len(flow_TT))
            flow_TT = mixed_TT / mixed_TT.sum(axis=1, keepdims=True) @ flow_TT
            flows.append(flow_TT[0, 1:].reshape(rollout_BLGJ.shape[2:]))
        assert np.abs(reference_masks(np.stack(flows)) - rollout_BLGJ[image]).max() < 1e-4


def test_reference_masks_divide_by_each_maximum_alone() -> None:
    rollout_LGJ = np.array([[[0.1, 0.2, 0.4]], [[0.02, 0.01, 0.005]], [[0.0, 0.0, 0.0]]])
    assert reference_masks(rollout_LGJ).tolist() == [
        [[0.25, 0.5, 1]],
        [[1, 0.5, 0.25]],
        [[0, 0, 0]],
    ]


def test_reference_frames_are_two_panels_of_equal_contrast() -> None:
    picture_HWC = np.full((20, 28, 3), 200, dtype=np.uint8)
    rising_GJ = np.arange(35.0).reshape(5, 7)
    rollout_LGJ = np.stack([rising_GJ, 60 + rising_GJ, 900 + rising_GJ[::-1, ::-1]])
    frames = reference_frames(picture_HWC, rollout_LGJ, title="cat", prediction="dog 51.0%")
    first_HWC, second_HWC, third_HWC = (np.asarray(frame).astype(int) for frame in frames)
    rows, columns = np.nonzero((first_HWC == 200).all(axis=2))
    top, left = rows[0], columns[0]
    height, width = 14 * 20, 14 * 28  # pixels as squares of 14
    assert (first_HWC[top : top + height, left : left + width] == 200).all()

    start = left + width + second_gap(first_HWC[top + 9, left + width :])
    panel = (slice(top, top + height), slice(start, start + width))
    assert [p[panel].min() for p in (first_HWC, second_HWC, third_HWC)] == [0] * 3
    assert [p[panel].max() for p in (first_HWC, second_HWC, third_HWC)] == [200] * 3
    assert np.abs(first_HWC[panel] - second_HWC[panel]).max() <= 1
    assert np.abs(first_HWC[panel] - third_HWC[panel][::-1, ::-1]).max() <= 1
    expected_HW = 200 * place(rising_GJ / 34, (20, 28), (20, 28), "squash")
    assert np.abs(first_HWC[panel][7::14, 7::14, 0] - expected_HW).max() <= 0.51
    titles = [p[:top, start:] for p in (first_HWC, second_HWC, third_HWC)]
    assert not np.array_equal(titles[0], titles[1])


def second_gap(row_WC: np.ndarray) -> int:
    """White pixels up to the next panel."""
    return int(np.nonzero((row_WC != 255).any(axis=1))[0][0])


def test_reference_frames_show_label_prediction_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []

    def note(panels: list[list[Panel]], *, caption: str, ink: str) -> Image.Image:
        drawn.append([*(panel.title for panel in panels[0]), caption.splitlines()[0], ink])
        return Image.new("RGB", (3, 2))

    monkeypatch.setattr("vitrail.explain.draw.compose", note)
    picture_HWC, rollout_LGJ = picture(8, 12), RANDOM.random((3, 2, 3))
    reference_frames(picture_HWC, rollout_LGJ, title="cat", prediction="dog 51.0%", ink=RED,
                layers=(2, 3, 6))  # fmt: skip
    assert drawn == [
        ["Original (cat)", f"Rollout through layer {layer}", "dog 51.0%", RED]
        for layer in (2, 3, 6)
    ]
    drawn.clear()
    reference_frames(picture_HWC, rollout_LGJ)
    assert [row[:2] for row in drawn] == [
        ["Original", f"Rollout through layer {layer}"] for layer in (1, 2, 3)
    ]
