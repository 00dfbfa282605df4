"""ONNX files predict without torch; written by hand here, since an export takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.data.pictures import Fit, fit_picture, read_picture
from vitrail.errors import EXTRAS, CheckpointError, ConfigError, import_optional
from vitrail.inference.onnx_classifier import load_onnx, read_metadata, write_metadata
from vitrail.inference.predictions import rank

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CONFIG = Config(
    model=ModelConfig(image_size=(8, 12), patch_size=4, n_classes=3),
    data=DataConfig(mean=(0.1, 0.5, 0.3), std=(0.2, 0.25, 0.4), fit="pad"),
)
FITS: tuple[Fit, Fit] = ("crop", "pad")
CLASSES = ("red", "green", "blå")


def write_model(path: Path, face: str, metadata: dict[str, str], columns: int = 3) -> Path:
    """Write a model whose logits, or probabilities, are the mean of each channel."""
    make, types = onnx.helper, onnx.TensorProto
    shape = ["B", 3, 8, 12] if face == "images" else ["B", 8, 12, 3]
    kind = types.FLOAT if face == "images" else types.UINT8
    axes = [2, 3] if face == "images" else [1, 2]
    out = {"images": "logits", "raw": "probabilities"}.get(face, "scores")
    nodes = [
        make.make_node("Cast", [face], ["floats"], to=types.FLOAT),
        make.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        make.make_node("Slice", ["means", "zero", "columns", "one"], [out]),
    ]
    constants = {"axes": axes, "zero": [0], "columns": [columns], "one": [1]}
    graph = make.make_graph(
        nodes,
        "means",
        [make.make_tensor_value_info(face, kind, shape)],
        [make.make_tensor_value_info(out, types.FLOAT, ["B", columns])],
        [make.make_tensor(n, types.INT64, [len(v)], v) for n, v in constants.items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10)
    make.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def images_file(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.onnx", "images", write_metadata(CONFIG, CLASSES, raw=False))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "p.png"
    noise_HWC = np.random.default_rng(7).integers(0, 256, (13, 40, 3), dtype=np.uint8)
    Image.fromarray(noise_HWC).save(path)
    return path


def test_pictures_are_normalized_as_the_metadata_say(images_file: Path) -> None:
    classifier = load_onnx(images_file, threads=1)
    raw_HWC = np.random.default_rng(3).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    means_C = (raw_HWC / 255).mean(axis=(0, 1))
    logits_Y = (means_C - CONFIG.data.mean) / CONFIG.data.std
    expected = np.exp(logits_Y) / np.exp(logits_Y).sum()
    (top,) = classifier.predict(raw_HWC, top_k=5)
    assert [p.name for p in top] == [CLASSES[y] for y in np.argsort(-expected)]
    assert [p.probability for p in top] == pytest.approx(sorted(expected, reverse=True), rel=1e-5)


def test_a_file_with_uint8_input_gets_bytes(tmp_path: Path) -> None:
    metadata = write_metadata(CONFIG, CLASSES, raw=True)
    classifier = load_onnx(write_model(tmp_path / "raw.onnx", "raw", metadata), threads=1)
    raw_BHWC = np.random.default_rng(4).integers(0, 256, (7, 8, 12, 3), dtype=np.uint8)
    found_BY, _ = classifier.raw_outputs(raw_BHWC, batch_size=3)
    np.testing.assert_allclose(np.exp(found_BY), raw_BHWC.mean(axis=(1, 2)), rtol=1e-5)
    assert classifier.predict([]) == []


def test_the_metadata_round_trips(images_file: Path) -> None:
    classifier = load_onnx(images_file, threads=1)
    assert (classifier.config.model, classifier.classes) == (CONFIG.model, CLASSES)
    assert (classifier.config.data.mean, classifier.config.data.std) == (
        CONFIG.data.mean, CONFIG.data.std,
    )  # fmt: skip
    assert classifier.config.data.fit == "pad"


def test_the_metadata_contains_no_local_paths() -> None:
    config = Config(data=DataConfig(data_path=Path("/home/somebody/secret")))
    assert "secret" not in str(write_metadata(config, CLASSES, raw=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": None}, "not exported by vitrail: its metadata lacks classes"),
        ({"classes": '["a", "b"]'}, "2 class names for 3 classes"),
        ({"classes": '{"a": 1}'}, "not a list of names"),
        ({"mean": "[0.1"}, "its metadata is corrupt"),
        ({"std": "[0, 0, 0]"}, "its metadata is corrupt: std"),
        ({"fit": "stretch"}, "its metadata is corrupt: fit"),
    ],
)
def test_invalid_metadata_is_refused(change: dict[str, str | None], message: str) -> None:
    metadata = {**write_metadata(CONFIG, CLASSES, raw=False), **change}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        read_metadata(metadata, Path("m.onnx"))


def test_other_files_are_refused(tmp_path: Path, images_file: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_onnx(tmp_path / "none.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(images_file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"damaged\.onnx: not a valid ONNX file"):
        load_onnx(damaged)
    metadata = write_metadata(CONFIG, CLASSES, raw=False)
    with pytest.raises(CheckpointError, match="its first input is 'x'"):
        load_onnx(write_model(tmp_path / "x.onnx", "x", metadata))
    few = load_onnx(write_model(tmp_path / "few.onnx", "images", metadata, columns=2))
    with pytest.raises(CheckpointError, match=r"output \(1, 2\) for 1 pictures and 3 classes"):
        few.predict(np.zeros((8, 12, 3), np.uint8))
    other = {**metadata, "model": json.dumps({"image_size": 16, "n_classes": 3})}
    wrong = load_onnx(write_model(tmp_path / "wrong.onnx", "images", other))
    with pytest.raises(CheckpointError, match="cannot be run"):
        wrong.predict(np.zeros((8, 12, 3), np.uint8))


def test_an_unavailable_device_is_refused(images_file: Path) -> None:
    with pytest.raises(ConfigError, match="device mps is not available to onnxruntime, only cpu"):
        load_onnx(images_file, device="mps")


def test_equal_probabilities_come_in_the_order_of_classes() -> None:
    ranked = rank(np.array([[0.2, 0.3, 0.2, 0.3]]), "abcd", top_k=3)
    assert [p.name for p in ranked[0]] == ["b", "d", "a"]
    with pytest.raises(ConfigError, match="top_k is 0"):
        rank(np.ones((1, 2)), "ab", top_k=0)


def test_predict_runs_where_torch_cannot_be_imported(
    images_file: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "block" / "torch").mkdir(parents=True)
    (tmp_path / "block/torch/__init__.py").write_text("raise ImportError('torch was imported')")
    path = os.pathsep.join([str(tmp_path / "block"), os.environ.get("PYTHONPATH", "")])
    words = ["predict", "--model_path", images_file, "--json", "--fit", "crop", picture]
    done = subprocess.run(
        [sys.executable, "-m", "vitrail", *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    classifier, rgb_HWC = load_onnx(images_file, threads=1), read_picture(picture)
    cropped, padded = (classifier.predict(fit_picture(rgb_HWC, (8, 12), f))[0] for f in FITS)
    assert answer["predictions"] == [
        {"class": p.name, "probability": pytest.approx(p.probability)} for p in cropped
    ]
    assert cropped[0].probability != pytest.approx(padded[0].probability)


@pytest.mark.parametrize("command", ["test", "explain", "inspect"])
def test_other_commands_refuse_an_onnx_file(
    command: str, images_file: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(picture)] if command == "explain" else []
    assert main([command, *words, "--model_path", str(images_file)]) == 2
    assert "an ONNX file works with vitrail predict only" in capsys.readouterr().err


@pytest.mark.parametrize("library", sorted(EXTRAS))
def test_a_missing_library_names_its_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    wanted = rf'{library} is not installed: pip install -e "\.\[{EXTRAS[library]}\]"'
    with pytest.raises(ConfigError, match=wanted):
        import_optional(library)


def test_a_broken_library_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_there.py").write_text("import lost_part")
    with pytest.raises(ConfigError, match="half_there lacks lost_part"):
        import_optional("half_there")
    (tmp_path / "odd.py").write_text("from json import nothing")
    with pytest.raises(ConfigError, match="odd cannot be imported: cannot import name 'nothing'"):
        import_optional("odd")


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("export --model_path m", "export"),
        ("predict --model_path {file} {picture}", "export"),
        ("sweep --search n_layers=1,2", "sweep"),
    ],
)
def test_commands_without_their_extra_say_one_line(
    words: str,
    extra: str,
    images_file: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for library in EXTRAS:
        monkeypatch.setitem(sys.modules, library, None)
    assert main(words.format(file=images_file, picture=picture).split()) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f'pip install -e ".[{extra}]"' in message
