"""Representations of objects: one line; in a notebook, the picture itself."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.config.settings import Config, ModelConfig
from vitrail.data.images import ImageSet
from vitrail.inference.classifier import Classifier
from vitrail.inference.onnx_classifier import OnnxClassifier
from vitrail.inference.predictions import Prediction, rank
from vitrail.model.vit import VisionTransformer

pytestmark = pytest.mark.usefixtures("small_sheets")

RGB = np.random.default_rng(3).integers(0, 256, (11, 17, 3), dtype=np.uint8)
CLASSES = ("cat", "<b>cow</b>", "d\x1bog")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """An untrained model of 8 x 12 pixels."""
    torch.manual_seed(3)
    config = ModelConfig(
        image_size=(8, 12), patch_size=4, n_classes=3, embed_dim=12, n_layers=2, n_attention_heads=3
    )
    return Classifier(VisionTransformer(config).eval(), Config(config), CLASSES, "output/quick")


def test_every_object_is_one_line(classifier: Classifier) -> None:
    count = sum(parameter.numel() for parameter in classifier.model.parameters())
    onnx = OnnxClassifier(object(), classifier.config, CLASSES, "m.onnx")
    explanation = classifier.explain(RGB, name="x.png", class_name="cat")
    images = ImageSet(torch.zeros(7, 3, 8, 12, dtype=torch.uint8), torch.zeros(7), CLASSES)
    assert repr(classifier) == (
        f"Classifier('output/quick', 3 classes, {count:,} parameters, 8 x 12, cpu)"
    )
    assert repr(onnx) == "OnnxClassifier('m.onnx', 3 classes, 8 x 12)"
    assert repr(images) == "ImageSet(7 images, 3 x 8 x 12, 3 classes)"
    assert re.fullmatch(
        r"Explanation\('x.png', balanced, 3 maps, (cat|<b>cow</b>|d.og) [\d.]+%.*\)",
        repr(explanation),
    )
    assert repr(explanation.subject) == "Subject('x.png', 17 x 11 pixels)"
    assert repr(explanation.frames[0]).startswith("Frame('after layer 2', ")
    for each in (classifier, explanation, explanation.frames[0], classifier.predict(RGB)[0]):
        assert len(repr(each)) < 300
        assert repr(each).isprintable()


def test_the_bundled_model_counts_in_millions() -> None:
    shown = repr(vitrail.load("cifar10", device="cpu"))
    assert re.fullmatch(
        r"Classifier\('cifar10', 10 classes, \d+\.\dM parameters, 32 x 32, cpu\)", shown
    )


@pytest.mark.parametrize(
    ("settings", "kind", "frames"),
    [
        ({}, "gif", 16),
        ({"frames": "layers"}, "gif", 11),
        ({"frames": "layers", "layers": (2,)}, "png", 1),
        ({"frames": "heads"}, "png", 1),
        ({"method": "gradcam"}, "png", 1),
        ({"method": "all"}, "png", 1),
    ],
)
def test_a_notebook_shows_the_maps(
    settings: dict[str, object], kind: str, frames: int, classifier: Classifier
) -> None:
    explanation = classifier.explain(RGB, name="<x>.png", **settings)
    tag = explanation._repr_html_()
    found = re.fullmatch(r'<img alt="([^"<>]*)" src="data:image/(\w+);base64,([\w+/=]+)">', tag)
    assert found
    assert found[2] == kind
    assert "&lt;x&gt;.png" in found[1]
    with Image.open(io.BytesIO(base64.b64decode(found[3]))) as image:
        assert getattr(image, "n_frames", 1) == frames
        assert np.asarray(image.convert("RGB")).std() > 5
    with Image.open(io.BytesIO(explanation._repr_png_())) as sheet:
        assert sheet.format == "PNG"


def test_predictions_are_lists_and_bars_in_a_notebook(classifier: Classifier) -> None:
    found = rank(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]), CLASSES, top_k=2)
    assert found == [
        [Prediction("<b>cow</b>", 0.5), Prediction("cat", 0.25)],
        [Prediction("d\x1bog", 0.8), Prediction("cat", 0.1)],
    ]
    assert isinstance(found, list)
    assert repr(found[0]) == repr(list(found[0]))
    one, both = found[0]._repr_html_(), found._repr_html_()  # type: ignore[attr-defined]
    assert one.startswith("<table>")
    assert "<b>" not in one
    assert "&lt;b&gt;cow&lt;/b&gt;" in one
    assert "width:80px" in one
    assert ">50.0%<" in one
    assert both.count("<tr>") == 6
    assert ">[1]<" in both
    assert "\x1b" not in both
    many = rank(np.full((60, 3), 1 / 3), CLASSES, top_k=1)
    assert many._repr_html_().endswith("<p>and 10 more pictures</p>")  # type: ignore[attr-defined]


def test_the_package_has_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", vitrail.__version__)
