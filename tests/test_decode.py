"""Many picture files -> one tensor, in little memory, wide gray ones by one range."""

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data import formats, pictures
from vitrail.data.datasets import Decoded, decode
from vitrail.data.formats import Extent, PixelRange, choose_range, join, measure, to_bytes
from vitrail.data.pictures import Framing, enough_side, fit_picture, read_picture, stack_pictures

RAMP = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)


def run(paths: list[Path], side: int = 32, workers: int = 3, **options: object) -> Decoded:
    return decode(paths, size_hw=(side, side), fit="crop", num_workers=workers, **options)  # type: ignore[arg-type]


def save(folder: Path, *arrays: np.ndarray) -> list[Path]:
    """Write each array as a TIFF, which holds every kind of value."""
    paths = [folder / f"{number}.tif" for number in range(len(arrays))]
    for path, values in zip(paths, arrays, strict=True):
        Image.fromarray(values).save(path)
    return paths


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Twelve pictures of many sizes and modes; numbers 0, 4 and 11 cannot be read."""
    random, paths = np.random.default_rng(5), []
    for number in range(12):
        rgb = random.integers(0, 256, (20 + number, 40 - number, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rgb).convert(("RGB", "L", "P", "RGBA")[number % 4]).save(paths[-1])
    paths[0].write_text("no picture")
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    paths[11] = tmp_path / "none.png"
    return paths


def test_valid_pictures_are_in_order_without_gaps(mixed: list[Path]) -> None:
    decoded = run(mixed, side=9)
    assert decoded.raw_BCHW.dtype == np.uint8
    assert decoded.pixel_range is None
    for raw_CHW, index in zip(decoded.raw_BCHW, (1, 2, 3, 5, 6, 7, 8, 9, 10), strict=True):
        expected = fit_picture(read_picture(mixed[index]), (9, 9), "crop")
        assert np.array_equal(raw_CHW.transpose(1, 2, 0), expected)
    assert sorted(decoded.broken) == [0, 4, 11]
    assert decoded.broken[0] == "not a picture that can be read"
    assert decoded.broken[4].startswith("cannot be read: ")
    assert decoded.broken[11] == "cannot be read: No such file or directory"


def test_gray_models_get_one_channel(mixed: list[Path]) -> None:
    gray = run(mixed[1:4], side=9, n_channels=1)
    expected = stack_pictures(mixed[1:4], (9, 9), 1, "crop")
    assert np.array_equal(gray.raw_BCHW.transpose(0, 2, 3, 1), expected)
    assert run([], n_channels=1).raw_BCHW.shape == (0, 1, 32, 32)


@pytest.mark.parametrize("workers", [0, 1, 7])
def test_pixels_depend_on_neither_threads_nor_order(mixed: list[Path], workers: int) -> None:
    decoded = run(mixed, workers=workers)
    assert np.array_equal(decoded.raw_BCHW, run(mixed).raw_BCHW)
    backwards = run(mixed[::-1], workers=workers)
    assert np.array_equal(backwards.raw_BCHW[::-1], decoded.raw_BCHW)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_stops_all_threads(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def interrupt(path: Path, **_: object) -> np.ndarray:
        seen.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "read_pixels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([tmp_path] * 10_000, workers=workers)
    assert len(seen) < 10_000


MEMORY = """
import sys
from pathlib import Path
from vitrail.data.datasets import decode
paths = sorted(Path(sys.argv[1]).iterdir())
def held(what):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what)]
    return int(line.split()[1]) * 1024
decode(paths[:3], size_hw=(64, 64), fit="crop", num_workers=2)
before = held("VmRSS")
decoded = decode(paths * 10, size_hw=(400, 400), fit="crop", num_workers=2)
print((held("VmHWM") - before) / decoded.raw_BCHW.size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_is_at_most_1_3_times_the_result(tmp_path: Path) -> None:
    """500 pictures of 480 kB, some of them broken."""
    for number in range(50):
        path = tmp_path / f"{number:02}.png"
        Image.effect_noise((70, 70), 50).convert("RGB").save(path)
        if number % 25 == 7:
            path.write_text("no picture")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3


# Wide gray values: one range for all.


@pytest.mark.parametrize(
    ("low", "high", "floats", "expected"),
    [
        (0, 1, False, (0, 255)),
        (0, 255, False, (0, 255)),
        (17, 256, False, (0, 1023)),
        (0, 1023, False, (0, 1023)),
        (0, 4095, False, (0, 4095)),
        (4096, 4096, False, (0, 16_383)),
        (0, 65_535, False, (0, 65_535)),
        (0, 65_536, False, (0, 65_536)),
        (5, 70_000, False, (5, 70_000)),
        (-1, 255, False, (-1, 255)),
        (0.0, 0.01, True, (0, 1)),
        (0.0, 1.0, True, (0, 1)),
        (-0.235, 1.235, True, (0, 1)),
        (0.0, 1.26, True, (0.0, 1.26)),
        (-0.3, 1.0, True, (-0.3, 1.0)),
        (-0.2, 0.2, True, (-0.2, 0.2)),
        (-1.0, 1.0, True, (-1, 1)),
        (0.0, 31.0, True, (0, 31)),
        (0.0, 32.0, True, (0, 255)),
        (0.0, 255.0, True, (0, 255)),
        (280.0, 310.0, True, (280, 310)),
        (0.0, 9000.0, True, (0, 65_535)),
        (0.0, 65_535.0, True, (0, 65_535)),
        (0.0, 1e9, True, (0, 1e9)),
    ],
)  # fmt: skip
def test_the_range_follows_from_the_extent(
    low: float, high: float, floats: bool, expected: PixelRange
) -> None:
    assert choose_range(Extent(low, high, floats)) == expected


def test_the_range_has_no_sudden_loss_of_levels() -> None:
    """However high floating-point values go, their picture keeps an eighth of 255 levels."""
    for high in np.geomspace(0.13, 1e6, 997):
        low, top = choose_range(Extent(0.0, float(high), True))
        assert (min(high, top) - low) / (top - low) >= 1 / 8


def test_extents_ignore_values_that_are_not_finite() -> None:
    odd = np.array([[np.nan, np.inf, -np.inf, 280, 310]], np.float32)
    assert measure(odd) == Extent(280, 310, True)
    assert measure(odd[:, :3]) == Extent(0, 0, True)
    assert measure(np.array([[3, 9]], np.uint16)) == Extent(3, 9, False)
    assert join([Extent(3, 9, False), Extent(-1, 5, True)]) == Extent(-1, 9, True)


def test_values_are_converted_to_bytes_in_parts() -> None:
    values_HW = np.arange(2_111 * 1_009, dtype=np.float32).reshape(2_111, 1_009) - 7
    low, high = float(values_HW.min()), float(values_HW.max())
    expected = ((values_HW.astype(float) - low) * (255 / (high - low))).round().astype(np.uint8)
    assert np.array_equal(to_bytes(values_HW, (low, high)), expected)
    values = np.array([[-5, 0, 51, 300]], np.int32)
    assert to_bytes(values, (0, 255)).tolist() == [[0, 0, 51, 255]]
    assert to_bytes(np.array([[np.nan, np.inf, 7.0]]), (2, 7)).tolist() == [[0, 0, 255]]
    assert to_bytes(np.array([[3.0, 3.0]]), (3, 3)).tolist() == [[0, 0]]


@pytest.fixture
def no_guesses() -> Iterator[None]:
    pictures.guesses.clear()
    yield
    pictures.guesses.clear()


@pytest.mark.parametrize(
    ("values", "extent"),
    [
        ((RAMP * 255).astype(np.uint16), "0..255 read as 0..255"),
        ((RAMP * 1023).astype(np.uint16), "0..1023 read as 0..1023"),
        ((RAMP * 4095).astype(np.uint16), "0..4095 read as 0..4095"),
        ((RAMP * 65_535).astype(np.uint16), "0..65535 read as 0..65535"),
        ((RAMP * 255).astype(np.int32), "0..255 read as 0..255"),
        (RAMP, "0..1 read as 0..1"),
        (RAMP * np.float32(1.004), "0..1.004 read as 0..1"),
    ],
)
def test_every_depth_keeps_256_levels(
    values: np.ndarray,
    extent: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    no_guesses: None,
) -> None:
    paths = save(tmp_path, values, values)
    decoded = run(paths)
    assert np.unique(decoded.raw_BCHW).size >= 255
    assert decoded.raw_BCHW.max() == 255
    alone = [read_picture(path).transpose(2, 0, 1) for path in paths]
    assert np.array_equal(alone, decoded.raw_BCHW)
    of_all, single = caplog.messages  # the second single picture logs nothing
    assert (
        of_all == f"wide gray pictures: 2 files, values {extent} -> 0..255; --pixel_range sets it"
    )
    assert single.startswith(f"{paths[0]}: a single wide gray picture: values {extent} -> ")


def test_one_range_holds_for_all_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dark, bright = np.full((32, 32), 100, np.uint16), np.full((32, 32), 4000, np.uint16)
    paths = save(tmp_path, dark, bright)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "narrow.png")
    decoded = run([paths[0], tmp_path / "narrow.png", paths[1]])
    assert decoded.pixel_range == (0, 4095)
    assert decoded.raw_BCHW[:, 0, 0, 0].tolist() == [6, 9, 249]
    assert "2 files, values 100..4000" in caplog.text
    caplog.clear()
    given = run([paths[0], paths[1]], pixel_range=(0, 8000))
    assert given.pixel_range == (0, 8000)
    assert given.raw_BCHW[:, 0, 0, 0].tolist() == [3, 128]
    assert not caplog.records


def test_a_barely_used_range_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vitrail"):
        run(save(tmp_path, np.array([[60_000, 60_100]], np.uint16)))
        run(save(tmp_path, RAMP / 9))
        run(save(tmp_path, RAMP / 7))
    assert ["of it is used: dark or pale" in message for message in caplog.messages] == [
        True, True, False,
    ]  # fmt: skip
    assert "only 0.2% of it is used" in caplog.messages[0]


# JPEG at reduced scale.


def photograph(height: int, width: int) -> np.ndarray:
    """Noise of every scale, the coarse ones strongest as in photographs, with an edge."""
    random, sum_HWC = np.random.default_rng(3), np.zeros((height, width, 3))
    for step in (1, 2, 4, 8, 16, 32, 64):
        noise = random.integers(0, 256, (height // step + 1, width // step + 1, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
        sum_HWC += (np.asarray(smooth) - 128.0) * step**0.9 / 64
    sum_HWC[:, width // 3 :] += 20
    return np.clip(128 + sum_HWC, 0, 255).astype(np.uint8)


def jpeg(rgb_HWC: np.ndarray, **settings: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb_HWC).save(file, "JPEG", quality=92, **settings)
    return file.getvalue()


def test_jpegs_decoded_at_reduced_scale_are_equally_good(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(photograph(768, 1024)))
    assert read_picture(path, shorter_side=96).shape == (96, 128, 3)
    assert read_picture(path, shorter_side=97).shape == (192, 256, 3)
    assert read_picture(path, shorter_side=385).shape == (768, 1024, 3)
    assert enough_side((24, 16), "crop") == 96
    assert enough_side((24, 16), Framing("crop", crop_pct=0.75)) == 128
    assert enough_side((24, 16), Framing("crop", "nearest")) is None
    for side in (24, 32, 48, 96):
        full = fit_picture(read_picture(path), (side, side), "crop").astype(int)
        (reduced_CHW,) = run([path], side=side).raw_BCHW
        apart = np.abs(reduced_CHW.transpose(1, 2, 0) - full)
        assert apart.max() <= 2
        alone = stack_pictures(path, (side, side), 3, "crop")[0]
        assert np.array_equal(alone, reduced_CHW.transpose(1, 2, 0))


def test_a_jpeg_of_108_megapixels_is_reduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are a thousandth here: 108,000 pixels are too many."""
    monkeypatch.setattr(formats, "MAX_PIXELS", 100_000)
    monkeypatch.setattr(formats, "MAX_JPEG_PIXELS", 250_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # Pillow's own: twice that is an error
    photo = photograph(300, 360)
    path = tmp_path / "phone.jpg"
    Image.fromarray(photo).save(path, quality=90, exif=thumbnail())
    read = read_picture(path)
    assert read.shape == (150, 180, 3)
    halved = photo.reshape(150, 2, 180, 2, 3).mean(axis=(1, 3))
    assert np.abs(read - halved).mean() < 5
    assert run([path]).broken == {}
    for refused, reason in ((jpeg(photograph(500, 510)), "510 x 500 pixels, more than 250,000"),):
        path.write_bytes(refused)
        (said,) = run([path]).broken.values()
        assert said == f"{reason}: make it smaller"
    Image.fromarray(photo).save(tmp_path / "large.png")
    (said,) = run([tmp_path / "large.png"]).broken.values()
    assert said == "too large: more than 100,000 pixels"


def thumbnail() -> bytes:
    """EXIF with an embedded JPEG thumbnail, as cameras write it."""
    small = jpeg(photograph(30, 40))
    head = b"II*\0\x08\0\0\0\0\0\x0e\0\0\0"
    tags = (b"\x01\x02\x04\0\x01\0\0\0" + (44).to_bytes(4, "little")
            + b"\x02\x02\x04\0\x01\0\0\0" + len(small).to_bytes(4, "little"))  # fmt: skip
    return b"Exif\0\0" + head + b"\x02\0" + tags + b"\0\0\0\0" + small
