"""Arrays, tensors, files and paths as pictures: read consistently, or refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.cli import explain as cli_explain
from vitrail.cli.explain import ExplainOptions
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.data.images import ImageSet
from vitrail.data.pictures import read_picture, stack_pictures
from vitrail.errors import ConfigError, PictureError, VitrailError
from vitrail.explain.map_settings import METHODS, TITLES
from vitrail.inference.classifier import Classifier
from vitrail.model.vit import VisionTransformer

RGB = np.random.default_rng(3).integers(0, 256, (11, 17, 3), dtype=np.uint8)
GRAY = RGB[:, :, 0]
CLASSES = ("cat", "dog", "<b>cow</b>")


@pytest.fixture
def classifier() -> Classifier:
    """An untrained model of 8 x 12 pixels."""
    torch.manual_seed(3)
    config = ModelConfig(
        image_size=(8, 12), patch_size=4, n_classes=3, embed_dim=12, n_layers=2, n_attention_heads=3
    )
    model = VisionTransformer(config).eval()
    return Classifier(model, Config(config, DataConfig(fit="pad")), CLASSES, "somewhere")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def at_end() -> io.BytesIO:
    """A file in memory, positioned at its end."""
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG")
    return file


class Unseekable(io.BytesIO):
    """A stream that can be read once."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise io.UnsupportedOperation


def floats(dtype: str) -> np.ndarray:
    return (RGB / 255).astype(dtype)


TAKEN: dict[str, Callable[[], Any]] = {
    "uint8": lambda: RGB,
    "float32": lambda: floats("float32"),
    "float64": lambda: floats("float64"),
    "float16": lambda: floats("float16"),
    "overshoot of a rounding": lambda: floats("float32") * np.float32(1.0000002),
    "not contiguous": lambda: np.flip(np.flip(RGB, 1).copy(), 1),
    "(C, H, W)": lambda: RGB.transpose(2, 0, 1),
    "(1, H, W, C)": lambda: RGB[None],
    "(1, C, H, W)": lambda: RGB.transpose(2, 0, 1)[None],
    "RGBA": lambda: np.dstack([RGB, np.full_like(GRAY, 255)]),
    "RGBA floats, (C, H, W)": lambda: np.dstack([floats("float32"), np.ones((11, 17))]).transpose(
        2, 0, 1
    ),
    "tensor": lambda: torch.from_numpy(RGB),
    "tensor (C, H, W)": lambda: torch.from_numpy(RGB).permute(2, 0, 1),
    "tensor floats": lambda: torch.from_numpy(floats("float32")).permute(2, 0, 1),
    "tensor with gradient": lambda: torch.from_numpy(floats("float32")).requires_grad_(),
    "list": lambda: [RGB],
    "tuple": lambda: (torch.from_numpy(RGB),),
    "generator": lambda: (each for each in [RGB]),
    "bytes": lambda: png(Image.fromarray(RGB)),
    "bytearray": lambda: bytearray(png(Image.fromarray(RGB))),
    "memoryview": lambda: memoryview(png(Image.fromarray(RGB))),
    "BytesIO": lambda: io.BytesIO(png(Image.fromarray(RGB))),
    "BytesIO at its end": at_end,
    "stream": lambda: Unseekable(png(Image.fromarray(RGB))),
    "Pillow": lambda: Image.fromarray(RGB),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_every_form_of_a_picture_is_the_same_picture(kind: str, classifier: Classifier) -> None:
    make, expected = TAKEN[kind], stack_pictures(RGB, (8, 12), 3, "pad")
    off = 1 if "float16" in kind else 0  # 11 bits hold the half levels only just
    assert np.abs(classifier.read(make()).astype(int) - expected).max() <= off
    if kind not in ("list", "tuple", "generator"):
        if "(1," not in kind:
            assert np.abs(read_picture(make()).astype(int) - RGB).max() <= off
        assert np.array_equal(classifier.subject(make()).raw_HWC, classifier.read(make())[0])
    if not off:
        assert classifier.predict(make()) == classifier.predict(RGB)
        assert torch.equal(classifier.prepare(make()), classifier.prepare(RGB))


GRAYS: dict[str, Callable[[], Any]] = {
    "(H, W)": lambda: GRAY,
    "(H, W, 1)": lambda: GRAY[:, :, None],
    "(1, H, W)": lambda: torch.from_numpy(GRAY.copy())[None],
    "(B, 1, H, W)": lambda: GRAY[None, None],
    "floats": lambda: GRAY / 255,
}


@pytest.mark.parametrize("kind", GRAYS)
def test_gray_is_every_channel(kind: str) -> None:
    read = stack_pictures(GRAYS[kind](), (11, 17), 3, "crop")
    assert np.array_equal(read[0], np.dstack([GRAY] * 3))
    assert np.array_equal(stack_pictures(GRAYS[kind](), (11, 17), 1, "crop")[0, :, :, 0], GRAY)


def test_bool_is_black_and_white() -> None:
    assert np.array_equal(read_picture(GRAY > 99)[:, :, 1], (GRAY > 99) * 255)
    assert np.array_equal(read_picture(torch.from_numpy(RGB > 99)), (RGB > 99) * 255)


def test_bfloat16_keeps_its_eight_bits() -> None:
    read = read_picture(torch.from_numpy(floats("float32")).bfloat16())
    assert np.abs(read.astype(int) - RGB).max() <= 1


def test_alpha_lies_over_the_ground() -> None:
    rgba = np.zeros((5, 7, 4), np.uint8)
    assert read_picture(rgba, background=(7, 8, 9))[2, 2].tolist() == [7, 8, 9]
    assert read_picture(rgba / 255)[2, 2].tolist() == [255, 255, 255]


@pytest.mark.parametrize("channels_first", [False, True])
def test_batches_and_lists_keep_their_order(
    channels_first: bool, classifier: Classifier, tmp_path: Path
) -> None:
    batch = np.stack([RGB, 255 - RGB, RGB // 2])
    given = batch.transpose(0, 3, 1, 2) if channels_first else batch
    # A batch may use other kernels than one picture: equal up to rounding.
    expected = [
        [(p.name, pytest.approx(p.probability, rel=1e-6)) for p in classifier.predict(each)[0]]
        for each in batch
    ]
    assert classifier.predict(given) == expected
    assert classifier.predict(torch.from_numpy(given / 255)) == expected
    path = tmp_path / "x.png"
    Image.fromarray(batch[1]).save(path)
    with path.open("rb") as file:
        mixed = [torch.from_numpy(batch[0]), file, Image.fromarray(batch[2])]
        assert classifier.predict(mixed) == expected
        assert classifier.subject(file).name == "x.png"
    assert classifier.predict(np.zeros((0, 8, 12, 3), np.uint8)) == []
    assert classifier.predict([]) == []


LARGE = np.arange(11 * 17 * 3).reshape(11, 17, 3)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "uint16": (lambda: LARGE.astype(np.uint16), "the picture is an array of uint16: give a file"),
    "int64": (lambda: RGB.astype(int), "array of int64"),
    "int8": (lambda: RGB.astype(np.int8), "array of int8"),
    "complex": (lambda: RGB.astype(complex), "array of complex128"),
    "strings": (lambda: np.array([["a.png"]]), "array of <U5"),
    "floats 0..255": (
        lambda: RGB.astype(np.float32),
        r"numbers from \d to 255: give numbers from 0 to 1, or uint8",
    ),
    "normalized": (lambda: RGB / 127.5 - 1, "numbers from -1 to 1: give numbers from 0 to 1"),
    "0..1.004": (lambda: RGB / 254, "from 0 to 1.004"),
    "NaN": (lambda: np.full((5, 7), np.nan), "from nan to nan"),
    "infinite": (lambda: np.full((5, 7), np.inf), "from inf to inf"),
    "(W,)": (lambda: RGB[0, :, 0], r"the shape \(17,\): give \(H, W\)"),
    "()": (lambda: np.float32(0.5), r"the shape \(\)"),
    "(H, W, 2)": (lambda: RGB[:, :, :2], r"the shape \(11, 17, 2\)"),
    "(B, H, W)": (lambda: np.zeros((5, 11, 17), np.uint8), r"the shape \(5, 11, 17\)"),
    "five axes": (lambda: RGB[None, None], r"the shape \(1, 1, 11, 17, 3\)"),
    "ambiguous": (
        lambda: np.zeros((3, 11, 4), np.uint8),
        r"\(3, 11, 4\), which could be \(H, W, C\) or \(C, H, W\): give a Pillow image",
    ),
    "no pixels": (lambda: np.zeros((0, 5, 3), np.uint8), "no pixels"),
    "None": (lambda: None, "the picture is a NoneType: give a file name, bytes"),
    "number": (lambda: 3, "the picture is a int"),
    "dict": (lambda: {"a.png": 1}, "the picture is a dict"),
    "list of None": (lambda: [RGB, None], r"pictures\[1\] is a NoneType"),
    "list of lists": (lambda: RGB.tolist(), r"pictures\[0\] is a list"),
    "list with a bad file": (lambda: [RGB, b"x"], r"pictures\[1\]: not a picture"),
    "sparse": (lambda: torch.zeros(5, 7).to_sparse(), "a Tensor that NumPy cannot read"),
    "text file": (lambda: io.StringIO("x"), "not open in binary mode"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_objects_are_refused_in_one_short_line(kind: str, classifier: Classifier) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(PictureError, match=reason) as refused:
        classifier.predict(make())
    assert len(str(refused.value)) < 260
    for call in (classifier.subject, classifier.explain, classifier.prepare):
        with pytest.raises(PictureError):
            call(make())


def test_explain_takes_one_picture(classifier: Classifier) -> None:
    for several in ([RGB, RGB], np.stack([RGB, RGB]), []):
        with pytest.raises(PictureError, match=r"^[02] pictures are given: give one$"):
            classifier.explain(several)  # type: ignore[arg-type]


def test_explain_sees_what_predict_sees(classifier: Classifier, tmp_path: Path) -> None:
    """A large JPEG is decoded at reduced size by both."""
    path = tmp_path / "large.jpg"
    Image.effect_noise((512, 384), 90).convert("RGB").save(path)
    subject = classifier.subject(path)
    assert subject.picture_HWC.shape == (384, 512, 3)
    assert torch.equal(subject.image_1CHW, classifier.prepare(path))
    (top,), explanation = classifier.predict(path, top_k=1), classifier.explain(path)
    assert explanation.class_index == CLASSES.index(top[0].name)


# Other mistakes.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.explain(RGB, metod="rollout"), "no setting 'metod'.*did you mean 'method'"),
        (lambda c: c.explain(RGB, method="rolout"), "'rolout', not one of .*mean 'rollout'"),
        (lambda c: c.explain(RGB, class_name=5), "the model has no class 5: one of cat, dog"),
        (lambda c: c.explain(RGB, class_name="dag"), "no class 'dag' .did you mean 'dog'"),
        (lambda c: c.explain(RGB, method="all", frames="heads"), "leave out frames"),
        (lambda c: c.predict(RGB, top_k=0), "top_k is 0"),
        (lambda c: c.predict(RGB, top_k="3"), "top_k is '3': give a whole number"),
        (lambda c: c.predict(RGB, top_k=2.5), "top_k is 2.5: give a whole"),
        (lambda c: c.model(torch.zeros(3, 8, 12)), r"\(3, 8, 12\): give \(number of images, 3, 8"),
        (lambda c: c.model(torch.zeros(2, 1, 8, 12)), r"\(2, 1, 8, 12\): give"),
        (lambda c: c.model(torch.zeros(2, 3, 32, 32)), r"\(2, 3, 32, 32\): give"),
        (lambda c: c.model.forward_with_attention(torch.zeros(1, 3, 12, 8)), "images have shape"),
        (lambda c: vitrail.load(3), "a model is a name or path, not a int"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_have_clear_messages(
    call: Callable[[Classifier], object], message: str, classifier: Classifier
) -> None:
    with pytest.raises(VitrailError, match=message):
        call(classifier)


def test_explain_shows_all_methods(classifier: Classifier) -> None:
    explanation = classifier.explain(RGB, method="all", class_name="dog", layers=(2,))
    layered = ("attention", "rollout", "gradient_rollout", "relevance")  # the others have no layers
    assert explanation.titles == tuple(
        TITLES[method] + (", layer 2" if method in layered else "") for method in METHODS
    )
    assert explanation.titles[3:6] == ("Relevance, layer 2", "Grad-CAM", "Balanced gradient")
    with pytest.raises(ConfigError, match="fusion is 'x'"):
        classifier.explain(RGB, method="all", fusion="x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (127, 127, 127)}, "mean is .*: pixels are scaled to 0..1: divide by 255"),
        ({"std": (58.4, 57.1, 57.4)}, "std is .*: pixels are scaled to 0..1: divide by 255"),
        ({"mean": (float("nan"), 0, 0)}, "mean is .*: give numbers from -1 to 1"),
        ({"std": (0.0, 1, 1)}, "std is .*: give numbers from 1e-06 to 1"),
        ({"pixel_range": (5, 5)}, "pixel_range is 5 5: give black, then a larger value for white"),
        ({"pixel_range": (0, float("inf"))}, "pixel_range is 0 inf"),
        ({"pixel_range": (float("nan"), 1)}, "pixel_range is nan 1"),
    ],
)
def test_impossible_pixels_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_a_models_range_is_used(classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "wide.tif"
    Image.fromarray(np.full((8, 12), 1000, np.uint16)).save(path)
    data = DataConfig(pixel_range=(0, 2000))
    ranged = Classifier(classifier.model, Config(classifier.config.model, data), CLASSES)
    assert (ranged.read(path) == 128).all()
    assert (ranged.subject(path).picture_HWC == 128).all()
    assert (classifier.read(path) == 249).all()


def test_an_image_of_four_pixels_is_not_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shape (4, 4, 3) could be RGBA, channels first; --index means what the data hold."""
    raw_BCHW = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    images = ImageSet(raw_BCHW, torch.tensor([1]), CLASSES)
    monkeypatch.setattr("vitrail.training.run_folder.load_split", lambda *_, **__: images)
    config = ModelConfig(image_size=4, n_classes=3, embed_dim=12, n_attention_heads=3, n_layers=1)
    tiny = Classifier(VisionTransformer(config).eval(), Config(config), CLASSES)
    subject = cli_explain.indexed(tiny, ExplainOptions(index=0))
    assert np.array_equal(subject.raw_HWC, raw_BCHW[0].permute(1, 2, 0))
    assert subject.label == "dog"
