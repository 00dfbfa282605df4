"""Exported files compute what the model does. The exports themselves take seconds each: slow."""

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.errors import ConfigError, ExportError
from vitrail.evaluation.calibration import Calibration
from vitrail.inference import export
from vitrail.inference.classifier import Classifier
from vitrail.inference.export import (
    CHECKED_BATCHES,
    EXAMPLE_BATCH,
    METADATA,
    TOLERANCE,
    Graph,
    check_outputs,
    to_onnx,
    to_program,
)
from vitrail.model.vit import VisionTransformer

VARIANTS = {
    "cls": {"pool": "cls", "position": "learned", "stem": "patch", "head": "mlp"},
    "rope": {"pool": "mean", "position": "rope", "stem": "conv", "head": "linear"},
    "gray": {"pool": "cls", "position": "sincos", "n_channels": 1, "image_size": (20, 28)},
}


def make_classifier(**model: object) -> Classifier:
    """A small model whose weights are large enough to distinguish images."""
    sizes = {"image_size": 12, "embed_dim": 24, "n_layers": 2, "n_attention_heads": 3}
    config = ModelConfig(n_classes=5, **{**sizes, **model})  # type: ignore[arg-type]
    torch.manual_seed(3)
    network = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4)
    data = DataConfig(mean=(0.3, 0.5, 0.4), std=(0.2, 0.3, 0.25))
    return Classifier(network, Config(model=config, data=data), tuple("abcde"), "made")


def test_the_example_has_another_size_than_the_checks() -> None:
    assert EXAMPLE_BATCH not in CHECKED_BATCHES


@pytest.mark.parametrize("raw", [False, True])
def test_the_graph_computes_what_the_model_does(raw: bool) -> None:
    classifier = make_classifier()
    graph = Graph(classifier, attention=True, raw=raw)
    batch = graph.batch(2)
    scores_BY, *attentions = graph(batch)
    assert batch.dtype == (torch.uint8 if raw else torch.float32)
    images_BCHW = classifier.prepare(list(batch.numpy())) if raw else batch
    logits_BY, expected = classifier.model.forward_with_attention(images_BCHW)
    torch.testing.assert_close(scores_BY, logits_BY.softmax(1) if raw else logits_BY)
    torch.testing.assert_close(attentions, list(expected))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda outputs, batch: outputs, None),
        (
            lambda outputs, batch: [out + 3e-4 for out in outputs],
            r"differs from the original by 3\.0e-04",
        ),
        (
            lambda outputs, batch: [out * torch.nan for out in outputs],
            "differs from the original by inf",
        ),
        (
            lambda outputs, batch: [out[:EXAMPLE_BATCH] for out in outputs],
            "output 0 of a batch of 7",
        ),
        (lambda outputs, batch: [outputs[0], outputs[1].mT], "output 1|differs"),
    ],
)
def test_a_file_that_computes_something_else_is_refused(
    spoil: Callable[..., list[torch.Tensor]], message: str | None
) -> None:
    graph = Graph(make_classifier(n_layers=1), attention=True)

    def run(batch: torch.Tensor) -> list[torch.Tensor]:
        with torch.inference_mode():
            return spoil(list(graph(batch)), batch)

    if message is None:
        assert check_outputs(graph, run) == 0
    else:
        with pytest.raises(ExportError, match=message):
            check_outputs(graph, run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--format torch --int8", "--int8 is for --format onnx"),
        ("--split test", "--split, --dataset and --data_path are for --int8"),
        ("--output_path a.bin", "give a file that ends in .onnx"),
        ("--format torch --output_path a.onnx", "give a file that ends in .pt2"),
    ],
)
def test_contradictory_flags_are_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model_path", "none", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_model_too_large_for_the_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="an ONNX file is limited to 2 GiB"):
        to_onnx(make_classifier())


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("raw", [False, True])
def test_onnx_gives_the_logits_and_attention_of_torch(
    variant: str, raw: bool, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from vitrail.inference.onnx_classifier import load_onnx

    classifier = make_classifier(**VARIANTS[variant])
    proto, difference = to_onnx(classifier, attention=True, raw=raw)
    assert difference < 1e-5
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    assert b"/src/" not in path.read_bytes()  # no line of code, no path of this machine
    exported = load_onnx(path, threads=1)
    (height, width), channels = classifier.config.model.image_hw, classifier.config.model.n_channels
    session = runtime.InferenceSession(str(path))
    names = [out.name for out in session.get_outputs()]
    assert names == [exported_name(raw), "attention_1", "attention_2"]
    for size in (1, 7, 64):
        shape = (size, height, width, channels)
        raw_BHWC = np.random.default_rng(size).integers(0, 256, shape, dtype=np.uint8)
        images_BHWC = raw_BHWC if channels == 3 else raw_BHWC.repeat(3, axis=3)
        images_BCHW = classifier.prepare(list(images_BHWC))
        with torch.inference_mode():
            logits_BY, attentions = classifier.model.forward_with_attention(images_BCHW)
        fed = raw_BHWC if raw else images_BCHW.numpy()
        scores_BY, *maps = session.run(None, {session.get_inputs()[0].name: fed})
        wanted_BY = logits_BY.softmax(1) if raw else logits_BY
        np.testing.assert_allclose(scores_BY, wanted_BY.numpy(), atol=1e-4)
        for map_BATT, attention_BATT in zip(maps, attentions, strict=True):
            np.testing.assert_allclose(map_BATT, attention_BATT.numpy(), atol=1e-4)
    ours = exported.predict(list(images_BHWC), top_k=5)
    theirs = classifier.predict(list(images_BHWC), top_k=5)
    assert [[p.name for p in top] for top in ours] == [[p.name for p in top] for top in theirs]


def exported_name(raw: bool) -> str:
    """Name of the first output."""
    return "probabilities" if raw else "logits"


@pytest.mark.slow
def test_a_torch_program_runs_with_torch_alone(tmp_path: Path) -> None:
    classifier = make_classifier()
    content, difference = to_program(classifier, attention=True, raw=True)
    assert difference < 1e-5
    path = tmp_path / "m.pt2"
    path.write_bytes(content)
    raw_BHWC = torch.randint(0, 256, (11, 12, 12, 3), dtype=torch.uint8)
    torch.save(raw_BHWC, tmp_path / "in.pt")
    code = (
        "import sys, torch\n"
        "program = torch.export.load('m.pt2').module()\n"
        "torch.save(program(torch.load('in.pt'))[0].detach(), 'out.pt')\n"
        "sys.exit('vitrail' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected_BY = classifier.probabilities(classifier.prepare(list(raw_BHWC.numpy())))
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected_BY)
    extra = {METADATA: ""}
    torch.export.load(io.BytesIO(content), extra_files=extra)
    assert json.loads(json.loads(extra[METADATA])["classes"]) == list("abcde")


@pytest.mark.parametrize(
    ("temperature", "place", "shift"), [(0.01, "argmin", 1.0), (1.0, "argmax", 0.1)]
)
def test_probabilities_are_compared_not_calibrated_logits(
    temperature: float, place: str, shift: float
) -> None:
    """The logit of an impossible class may differ, that of a probable class may not."""
    calibration = Calibration(temperature=temperature)
    graph = Graph(dataclasses.replace(make_classifier(), calibration=calibration))

    def run(batch: torch.Tensor) -> list[torch.Tensor]:
        scores_BY = graph(batch)[0]
        index_B1 = getattr(scores_BY, place)(1, keepdim=True)
        return [scores_BY.scatter_add(1, index_B1, torch.full_like(scores_BY, shift))]

    if place == "argmin":
        assert check_outputs(graph, run) <= TOLERANCE
    else:
        with pytest.raises(ExportError, match="differs from the original"):
            check_outputs(graph, run)


@pytest.mark.slow
def test_the_commands_on_a_run(
    tmp_path: Path, vitrail: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """float32 and int8 predict the same table as torch; both accuracies are printed."""
    pytest.importorskip("onnxscript")
    small = ["--epochs", "3", "--num_train_images", "2000", "--validation_images", "500"]
    assert vitrail("train", *small, "--folder_name", "quick", cwd=tmp_path).returncode == 0
    Image.effect_noise((40, 33), 90).convert("RGB").save(tmp_path / "p.png")
    done = vitrail("export", "--model_path", "output/quick", "--attention", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quick.onnx" in done.stdout
    assert "batches of 1, 7, 64" in done.stdout
    tables = [
        vitrail("predict", "--model_path", model, "p.png", "--csv", cwd=tmp_path).stdout
        for model in ("output/quick", "quick.onnx")
    ]
    assert tables[0].count("\n") == 4
    rows = [[line.split(",") for line in table.splitlines()[1:]] for table in tables]
    for torch_row, onnx_row in zip(*rows, strict=True):
        assert torch_row[:3] == onnx_row[:3]
        assert float(torch_row[3]) == pytest.approx(float(onnx_row[3]), abs=1e-5)
    done = vitrail("export", "--model_path", "output/quick", "--int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "500 images;" in done.stdout
    result = json.loads((tmp_path / "output/quick/result.json").read_text())
    assert f"{result['validation']['accuracy']:.2%}" in done.stdout
    assert (tmp_path / "quick-int8.onnx").stat().st_size < (tmp_path / "quick.onnx").stat().st_size
    done = vitrail("predict", "--model_path", "quick-int8.onnx", "p.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # A run without validation images names what else there is, and test uses are noted.
    config_file = tmp_path / "output/quick/test_uses.jsonl"
    before = len(config_file.read_text().splitlines())
    words = ["export", "--model_path", "output/quick", "--int8", "--split", "test"]
    assert vitrail(*words, cwd=tmp_path).returncode == 0
    assert len(config_file.read_text().splitlines()) == before + 1


def test_int8_needs_images_to_measure_on() -> None:
    from vitrail.cli.export import ExportOptions, measured_images

    classifier = make_classifier(image_size=32)
    data = dataclasses.replace(classifier.config.data, validation_images=0)
    config = dataclasses.replace(classifier.config, data=data)
    with pytest.raises(ConfigError, match="trained without validation images: give --split test"):
        measured_images(dataclasses.replace(classifier, config=config), ExportOptions(int8=True))
