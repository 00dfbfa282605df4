"""Any picture file -> RGB bytes."""

import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitrail.data import formats
from vitrail.data.formats import SUFFIXES, find_pictures, is_picture, left_out_reason
from vitrail.data.pictures import Fit, fit_picture, only_picture, read_picture
from vitrail.errors import PictureError

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about corrupt and large files

RGB = np.random.default_rng(3).integers(0, 256, (11, 17, 3), dtype=np.uint8)
GRAY = RGB[:, :, 0]


def encoded(image: Image.Image, format: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def gray_of(values: np.ndarray, format: str = "PNG") -> list[list[int]]:
    """What one channel of a picture with these values is read as."""
    rgb_HWC = read_picture(encoded(Image.fromarray(values), format))
    assert (rgb_HWC == rgb_HWC[:, :, :1]).all()
    return rgb_HWC[:, :, 0].tolist()


def test_reads_files_by_name_by_content_and_opened(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(encoded(Image.fromarray(RGB)))
    for source in (path, str(path), path.read_bytes(), Image.fromarray(RGB)):
        rgb_HWC = read_picture(source)
        assert rgb_HWC.dtype == np.uint8
        assert np.array_equal(rgb_HWC, RGB)


@pytest.mark.parametrize("read", [read_picture, only_picture])
def test_files_not_open_for_reading_bytes_are_refused(
    tmp_path: Path, read: Callable[[object], object]
) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(encoded(Image.fromarray(RGB)))
    with path.open() as file, pytest.raises(PictureError, match=r"cat\.png: not open in binary"):
        read(file)
    with pytest.raises(PictureError, match=r"cat\.png: cannot be read: .* closed file"):
        read(file)
    with path.open("ab") as file, pytest.raises(PictureError, match=r"cat\.png: cannot be read"):
        read(file)


def test_reads_gray_one_bit_and_palette() -> None:
    assert gray_of(GRAY) == GRAY.tolist()
    assert gray_of(GRAY > 99) == ((GRAY > 99) * 255).tolist()
    palette = Image.fromarray(RGB).quantize(13)
    assert np.array_equal(read_picture(encoded(palette)), np.array(palette.convert("RGB")))


def test_reads_16_bits_by_the_bits_that_are_used() -> None:
    deep = np.array([[0, 257, 128 * 257], [12_850, 65_278, 65_535]], dtype=np.uint16)
    assert gray_of(deep) == [[0, 1, 128], [50, 254, 255]]
    assert gray_of(deep.astype(np.int32), "TIFF") == [[0, 1, 128], [50, 254, 255]]
    assert gray_of(deep // 16) == [[0, 1, 128], [50, 254, 255]]
    assert gray_of(deep // 257) == [[0, 1, 128], [50, 254, 255]]


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ([0.0, 0.2, 1.0], [0, 51, 255]),
        ([0.5, 0.5, 0.5], [128, 128, 128]),
        ([0.0, 51.0, 200.0], [0, 51, 200]),
        ([0.0, 257.0, 25_700.0], [0, 1, 100]),
        ([-2.0, 0.0, 8.0], [0, 51, 255]),
        ([-7.0, -7.0, -7.0], [0, 0, 0]),
        ([np.nan, np.inf, 1.0], [0, 0, 255]),
    ],
)
def test_reads_floating_point_by_the_range_that_holds_it(
    values: list[float], read: list[int]
) -> None:
    assert gray_of(np.array([values], dtype=np.float32), "TIFF") == [read]


def test_reads_every_kind_of_nan() -> None:
    signalling = np.array([[0x7F80_0001, 0x3F80_0000]], dtype=np.uint32).view(np.float32)
    assert gray_of(signalling, "TIFF") == [[0, 255]]


def test_lays_alpha_over_the_ground() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 102, 255)
    assert read_picture(encoded(Image.fromarray(rgba)))[0].tolist() == [
        [255, 255, 255],
        [233, 153, 153],
        [200, 0, 0],
    ]
    over_blue = read_picture(encoded(Image.fromarray(rgba)), background=(0, 0, 250))
    assert over_blue[0].tolist() == [[0, 0, 250], [80, 0, 150], [200, 0, 0]]
    gray_alpha = Image.fromarray(rgba).convert("LA")
    assert read_picture(gray_alpha, background=(1, 2, 3))[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_lays_a_palette_with_transparency_over_the_ground(transparency: int | bytes) -> None:
    palette = Image.fromarray(np.array([[0, 1, 0]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    content = encoded(palette, transparency=transparency)
    row = read_picture(content, background=(7, 8, 9))[0].tolist()
    assert row == [[10, 20, 30], [7, 8, 9], [10, 20, 30]]


def test_reads_cmyk() -> None:
    cmyk = Image.new("CMYK", (5, 3), (255, 0, 0, 0))
    assert read_picture(encoded(cmyk, "TIFF"))[1, 2].tolist() == [0, 255, 255]
    red, green, blue = read_picture(encoded(cmyk, "JPEG"))[1, 2].tolist()
    assert red < 5
    assert min(green, blue) > 250


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_applies_the_exif_orientation(orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(
        read_picture(encoded(Image.fromarray(RGB), exif=exif)), np.rot90(RGB, turns)
    )
    rgba = Image.fromarray(np.dstack([RGB, np.where(GRAY > 99, 255, 0).astype(np.uint8)]))
    expected = np.where(GRAY[:, :, None] > 99, RGB, 255)
    assert np.array_equal(read_picture(encoded(rgba, exif=exif)), np.rot90(expected, turns))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_takes_the_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (7, 5), (level, level, level)) for level in (40, 140, 240)]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert abs(int(read_picture(content)[2, 3, 1]) - 40) < 4
    with Image.open(io.BytesIO(content)) as opened:
        opened.seek(2)
        assert abs(int(read_picture(opened)[2, 3, 1]) - 40) < 4


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_refuses_truncated_files_in_one_line_with_the_name(format: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.xyz"
    full = encoded(Image.fromarray(RGB), format)
    for length in (0, 1, 13, len(full) // 2, len(full) * 3 // 4):
        path.write_bytes(full[:length])
        with pytest.raises(PictureError) as refused:
            read_picture(path)
        assert str(refused.value).startswith(f"{path}: ")
        assert "\n" not in str(refused.value)


def test_refuses_missing_files_and_files_that_are_not_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"notes\.png: not a picture that can be read$"):
        read_picture(tmp_path / "notes.png")
    with pytest.raises(PictureError, match=r"none\.png: cannot be read: No such file"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(PictureError, match=r"cannot be read: Is a directory"):
        read_picture(tmp_path)


@pytest.mark.parametrize("side", [10_001, 20_011])
def test_refuses_a_bomb_before_it_is_decoded(side: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pbm"
    path.write_bytes(f"P4 {side} {side}\n".encode())
    bound = Image.MAX_IMAGE_PIXELS
    with pytest.raises(PictureError, match=r"bomb\.pbm: .*more than 100,000,000"):
        read_picture(path)
    assert bound == Image.MAX_IMAGE_PIXELS


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 23), st.integers(1, 23)),
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"]),
    st.sampled_from(["crop", "pad", "squash"]),
)
def test_every_mode_and_size_becomes_the_wanted_size(
    size: tuple[int, int], size_hw: tuple[int, int], mode: str, fit: Fit
) -> None:
    rgb_HWC = read_picture(Image.new(mode, size))
    assert rgb_HWC.shape == (size[1], size[0], 3)
    fitted_HWC = fit_picture(rgb_HWC, size_hw, fit)
    assert fitted_HWC.shape == (*size_hw, 3)
    assert fitted_HWC.dtype == rgb_HWC.dtype == np.uint8


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_picture_of_the_right_size_is_unchanged(fit: Fit) -> None:
    assert np.array_equal(fit_picture(RGB, (11, 17), fit), RGB)


def test_crops_pads_and_squashes() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = 60, 150, 240
    assert (fit_picture(wide, (10, 10), "crop") == 150).all()
    assert (fit_picture(wide, (5, 5), "crop")[:, 1:4] == 150).all()
    padded = fit_picture(wide, (30, 30), "pad")
    assert np.array_equal(padded[10:20], wide)
    assert not padded[:10].any()
    assert not padded[20:].any()
    left, middle, right = fit_picture(wide, (7, 3), "squash")[3, :, 1].tolist()
    assert 60 < left < middle == 150 < right == 300 - left


def test_scaling_is_pillows_antialiased_bilinear() -> None:
    expected = Image.fromarray(RGB).resize((5, 3), Image.Resampling.BILINEAR)
    assert np.array_equal(fit_picture(RGB, (3, 5), "squash"), np.array(expected))
    stripes = np.tile(np.array([0, 255], dtype=np.uint8)[None, :, None], (24, 12, 3))
    assert np.ptp(fit_picture(stripes, (4, 4), "squash")[:, 1:3].astype(int)) < 9


def test_finds_files_folders_and_globs(tmp_path: Path) -> None:
    names = ["b.JPG", "a.png", "in/side/c.webp", "notes.txt", ".hidden.png", "odd[1].png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*words: str) -> list[str]:
        paths = find_pictures([str(tmp_path / word) for word in words])
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert found("") == ["a.png", "b.JPG", "in/side/c.webp", "odd[1].png"]
    assert found("notes.txt", "a.png") == ["notes.txt", "a.png"]
    assert found("odd[1].png") == ["odd[1].png"]
    assert found("*.png") == ["a.png", "odd[1].png"]
    assert found("**/*.webp", "?.JPG") == ["in/side/c.webp", "b.JPG"]


def test_names_the_argument_that_matches_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PictureError, match=r"cat\.png: no such picture$"):
        find_pictures([str(tmp_path / "cat.png")])
    with pytest.raises(PictureError, match=r"\*\.gif: no such picture$"):
        find_pictures([str(tmp_path / "*.gif")])
    with pytest.raises(PictureError, match=r"empty: no picture in this folder$"):
        find_pictures([str(tmp_path / "empty")])
    for name in ("a.txt", "b.txt", "c"):
        (tmp_path / "empty" / name).write_text("no picture")
    with pytest.raises(PictureError, match=r"this folder, only 2 \.txt, 1 no suffix$"):
        find_pictures([str(tmp_path / "empty")])
    with pytest.raises(PictureError, match=r"^x{200}: File name too long$"):
        find_pictures(["x" * 999])


def test_a_folder_is_searched_through_links_and_not_in_hidden_folders(tmp_path: Path) -> None:
    for name in ("set/a.png", "set/.ipynb_checkpoints/a-checkpoint.png", "set/__MACOSX/a.png",
                 "elsewhere/b.png", "set/.git/c.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = find_pictures([str(tmp_path / "set")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "set/a.png", "set/link/b.png",
    ]  # fmt: skip


SIGNED = ["BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP"]


@pytest.mark.parametrize("format", SIGNED)
@pytest.mark.parametrize("name", ["photo", "photo.0001", "photo.dat"])
def test_pictures_are_recognized_with_any_extension(format: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(encoded(Image.fromarray(RGB), format))
    assert is_picture(path)
    assert find_pictures([str(tmp_path)]) == [path]
    path.rename(tmp_path / f".{name}")
    assert not is_picture(tmp_path / f".{name}")


OTHER = {
    "notes.txt": b"P is the first letter here, and BM follows\n",
    "code.h": b"#define im_size 3\n",
    "data.npy": b"\x93NUMPY\x01\0v\0{'descr': '<f4'}",
    "film.mp4": b"\0\0\0\x20ftypisom\0\0\0\0",
    "film.mpg": b"\0\0\x01\xb3\x16\x01\x20\x13\xff\xff\xe0\x18" + bytes(90),
    "page.pdf": b"%PDF-1.4\n",
    "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "empty": b"",
    "cut.png2": b"\x89PN",
}


def test_other_files_are_refused_and_named_by_their_extension(tmp_path: Path) -> None:
    for name, content in OTHER.items():
        (tmp_path / name).write_bytes(content)
        assert not is_picture(tmp_path / name), name
        assert left_out_reason(tmp_path / name) == (Path(name).suffix or "no suffix")
    (tmp_path / "folder.png").mkdir()
    assert not is_picture(tmp_path / "folder.png")
    assert not is_picture(tmp_path / "none")
    (tmp_path / "broken.JPG").write_text("no picture")
    assert left_out_reason(tmp_path / "broken.JPG") == "broken"


def test_common_extensions_are_recognized_without_opening_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in SUFFIXES:
        (tmp_path / f"a{suffix.upper()}").touch()
    monkeypatch.setattr(Path, "open", None)
    monkeypatch.setattr(Image, "open", None)
    assert all(map(is_picture, tmp_path.iterdir()))
    assert len(find_pictures([str(tmp_path)])) == len(SUFFIXES)


# HEIC.

HEIC = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(16)


@pytest.fixture
def forget_heif() -> Iterator[None]:
    """Make the presence of pillow-heif be checked again."""
    formats.register_heif.cache_clear()
    yield
    formats.register_heif.cache_clear()


def test_heic_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_heif: None
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    remedy = r'a HEIC picture: install pillow-heif: pip install -e "\.\[heic\]"$'
    for name in ("a.heic", "b.HEIF", "c.jpg", "d"):
        path = tmp_path / name
        path.write_bytes(HEIC)
        with pytest.raises(PictureError, match=remedy):
            read_picture(path)
        assert (
            left_out_reason(path) == f"{path.suffix.lower() or 'no suffix'} (install pillow-heif)"
        )
    assert find_pictures([str(tmp_path)]) == [tmp_path / "c.jpg"]
    (tmp_path / "c.jpg").unlink()
    with pytest.raises(PictureError, match=r"only 1 \.heic \(install pillow-heif\), 1 \.heif \("):
        find_pictures([str(tmp_path)])


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path, forget_heif: None) -> None:
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "photo.heic"
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 90, 30))).save(path, quality=95)
    assert is_picture(path)
    read = read_picture(path)
    assert read.shape == (48, 64, 3)
    assert np.abs(read.astype(int) - (200, 90, 30)).max() < 8


# PNGs with large texts.


def chunk(kind: bytes, body: bytes) -> bytes:
    sealed = kind + body
    return len(body).to_bytes(4) + sealed + zlib.crc32(sealed).to_bytes(4)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"zTXt", b"text\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"iTXt", b"text\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
        b"".join(
            chunk(b"tEXt", b"%d\0" % number + b"x" * 1_000_000) for number in range(70)
        ),
    ],
    ids=["profile", "compressed", "international", "70 MB"],
)  # fmt: skip
def test_large_texts_and_profiles_are_skipped(extra: bytes, before: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    full = encoded(Image.fromarray(RGB), exif=exif)
    at = full.index(b"IDAT" if before else b"IEND") - 4
    content = full[:at] + extra + full[at:]
    assert np.array_equal(read_picture(content), np.rot90(RGB, 3))
