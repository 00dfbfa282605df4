"""Image preparation of other systems' weights: read, reported, overridden, written."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vitrail
from layouts import make_state
from vitrail.cli import main
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.data.pictures import Framing, fit_picture, seen_box
from vitrail.errors import CheckpointError, ConfigError
from vitrail.inference.classifier import Classifier
from vitrail.model.vit import VisionTransformer
from vitrail.weights.checkpoint import CheckpointInfo, load_weights_file, save_weights_file

SIDE = 15
"""The image size of the weights in layouts.py."""
VIT = {"num_attention_heads": 3, "layer_norm_eps": 1e-6, "image_size": SIDE}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture of smooth noise, in which every pixel encodes its position."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 25 + 2, width // 25 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def huggingface(folder: Path, processor: dict[str, Any] | None) -> Path:
    """A Hugging Face folder with this preprocessor_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(VIT))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(make_state("huggingface"), folder / "model.safetensors")
    return folder


def timm(folder: Path, pretrained: dict[str, Any]) -> Path:
    """A timm folder with this pretrained_cfg."""
    folder.mkdir(exist_ok=True)
    about = {"model_args": {"num_heads": 3, "img_size": SIDE}, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(about))
    save_file(make_state("timm"), folder / "model.safetensors")
    return folder


def prepared_by_huggingface(processor: dict[str, Any], picture_HWC: np.ndarray) -> np.ndarray:
    """The processor's steps in their order, as transformers documents them, by Pillow."""
    image = Image.fromarray(picture_HWC)
    if processor["do_resize"]:
        size = processor["size"]
        if "shortest_edge" in size:
            edge, short, long = size["shortest_edge"], min(image.size), max(image.size)
            length = int(edge * long / short)
            wanted = (edge, length) if image.width <= image.height else (length, edge)
        else:
            wanted = (size["width"], size["height"])
        image = image.resize(wanted, Image.Resampling(processor["resample"]))
    if processor.get("do_center_crop"):
        rows, columns = processor["crop_size"]["height"], processor["crop_size"]["width"]
        top, left = (image.height - rows) // 2, (image.width - columns) // 2
        image = image.crop((left, top, left + columns, top + rows))
    values = np.asarray(image, np.float64)
    if processor["do_rescale"]:
        values = values * processor["rescale_factor"]
    if processor["do_normalize"]:
        values = (values - processor["image_mean"]) / processor["image_std"]
    return values


def prepared_by_timm(about: dict[str, Any], picture_HWC: np.ndarray) -> np.ndarray:
    """timm's steps in their order (timm/data/transforms_factory.py), by Pillow."""
    image, (_, rows, columns) = Image.fromarray(picture_HWC), about["input_size"]
    scaled = int(rows // about["crop_pct"]), int(columns // about["crop_pct"])
    resampling = Image.Resampling[about["interpolation"].upper()]
    if about["crop_mode"] == "squash":
        image = image.resize(scaled[::-1], resampling)
    else:
        assert about["crop_mode"] == "center"
        short, long = min(image.size), max(image.size)
        length = int(scaled[0] * long / short)
        wide = image.width > image.height
        image = image.resize((length, scaled[0]) if wide else (scaled[0], length), resampling)
    top, left = (round((image.height - rows) / 2.0), round((image.width - columns) / 2.0))
    image = image.crop((left, top, left + columns, top + rows))
    return (np.asarray(image) / 255 - about["mean"]) / about["std"]


def steepest(values_HWC: np.ndarray) -> float:
    """The largest difference of neighbors in a row, and in a column: what a pixel's shift makes."""
    return float(sum(np.abs(np.diff(values_HWC, axis=axis)).max() for axis in (0, 1)))


def prepared_by_us(classifier: Classifier, picture_HWC: np.ndarray) -> np.ndarray:
    """What the model reads (H, W, C)."""
    return classifier.prepare(picture_HWC)[0].permute(1, 2, 0).numpy()


BASE = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": SIDE, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
SQUARE = {"height": SIDE, "width": SIDE}
CROP = {"do_center_crop": True, "crop_size": SQUARE, "image_processor_type": "CLIPImageProcessor"}


@pytest.mark.parametrize(
    "changes",
    [
        {"size": SQUARE},
        {"size": SQUARE, "resample": 3},
        {"size": SQUARE, "resample": 0},
        {"size": SQUARE, "do_normalize": False},
        {"size": SQUARE, "do_rescale": False, "image_mean": [100, 120, 90], "image_std": [60] * 3},
        {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]},
        {"size": SQUARE, "do_rescale": False, "do_normalize": False},
        {"size": {"shortest_edge": 21}, "resample": 3, **CROP},
        {"size": {"shortest_edge": 19}, "resample": 1, **CROP},
        {"size": {"height": 25, "width": 25}, **CROP},
    ],
)
def test_every_step_of_a_processor_is_done(tmp_path: Path, changes: dict[str, Any]) -> None:
    processor = BASE | changes
    classifier = vitrail.load(huggingface(tmp_path / "hf", processor), device="cpu")
    assert not [note for note in classifier.notes if "assumed" in note]
    for hw in ((90, 90), (15, 15), (12, 12)):  # also what is of the model's size or smaller
        theirs = prepared_by_huggingface(processor, noise(*hw))
        # Of a part of a picture Pillow computes each weight anew: where it rounds to the other
        # side, a pass is a level off, and bicubic's second pass (1.25 at most) has two of them.
        levels = 0.0 if changes["size"] == SQUARE else 2.0
        most = levels / 255 / np.array(classifier.std) + 1e-5
        assert np.all(np.abs(prepared_by_us(classifier, noise(*hw)) - theirs) <= most)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_pad": True}, "do_pad True"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order True"),
        ({"rescale_offset": True}, "rescale_offset True"),
        ({"crop_pct": 0.9}, "crop_pct 0.9"),
        ({"size": {"longest_edge": 20}}, "size .*longest_edge"),
        ({"size": {"shortest_edge": 20, "longest_edge": 40}}, "size .*longest_edge"),
        ({"size": 20}, "produces pictures of 20 x 20 pixels, but the model reads 15 x 15"),
        ({"size": 10, **CROP, "image_processor_type": "ViT"}, "size 10 with crop_size"),
        ({"size": {"height": 20, "width": 30}, **CROP}, "size .* with crop_size"),
        ({"resample": 7}, "resample is 7, not 0 to 5"),
        ({"image_mean": [0.5, 0.5]}, "image_mean has 2 values"),
        ({"do_resize": False, **CROP}, "do_center_crop without do_resize"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "lacks do_center_crop"),
    ],
)
def test_unknown_steps_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as refusal:
        vitrail.load(huggingface(tmp_path / "hf", BASE | changes), device="cpu")
    assert "\n" not in str(refusal.value)


def test_one_value_stands_for_all_channels(tmp_path: Path) -> None:
    gray = BASE | {"image_mean": [0.3], "image_std": 0.6, "size": SQUARE}
    classifier = vitrail.load(huggingface(tmp_path / "hf", gray), device="cpu")
    assert (classifier.mean, classifier.std) == ((0.3, 0.3, 0.3), (0.6, 0.6, 0.6))
    gray_timm = timm(tmp_path / "timm", {"mean": [0.3], "std": [0.6]})
    assert vitrail.load(gray_timm, device="cpu").std == (0.6, 0.6, 0.6)


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.75])
def test_timms_steps_are_done(tmp_path: Path, mode: str, share: float) -> None:
    pretrained = {
        "input_size": [3, SIDE, SIDE], "mean": [0.48, 0.45, 0.4], "std": [0.23, 0.22, 0.2],
        "interpolation": "bicubic", "crop_mode": mode, "crop_pct": share,
    }  # fmt: skip
    classifier = vitrail.load(timm(tmp_path / "timm", pretrained), device="cpu")
    assert not [note for note in classifier.notes if "assumed" in note]
    scaled = int(SIDE // share)
    assert classifier.config.data.crop_pct == SIDE / scaled
    hw = (90, 90) if mode == "center" else (60, 90)
    theirs, ours = prepared_by_timm(pretrained, noise(*hw)), prepared_by_us(classifier, noise(*hw))
    off = 0.5 * ((scaled - SIDE) % 2)  # timm's crop is half a pixel off the middle
    assert np.abs(ours - theirs).max() <= off * steepest(theirs) + 2.01 / 255 / 0.2


def test_timm_steps_that_vitrail_lacks_are_refused_until_overridden(tmp_path: Path) -> None:
    folder = timm(tmp_path / "timm", {"crop_mode": "border", "interpolation": "random"})
    with pytest.raises(CheckpointError, match=r"crop_mode 'border'.* with vitrail ") as refused:
        vitrail.load(folder, device="cpu")
    with pytest.raises(CheckpointError, match=r"interpolation 'random'.* with vitrail convert "):
        vitrail.load(folder, fit="pad", crop_pct=1.0, device="cpu")
    remedy = shlex.split(str(refused.value).rpartition(" with vitrail ")[2])
    assert remedy[-4:] == ["--fit", "VALUE", "--interpolation", "VALUE"]
    file = str(tmp_path / "b.safetensors")
    assert main([remedy[0], remedy[1], file, "--fit", "squash", "--interpolation", "box"]) == 0
    converted = vitrail.load(file, device="cpu").config.data
    assert (converted.fit, converted.interpolation) == ("squash", "box")
    chosen = vitrail.load(folder, fit="squash", interpolation="box", device="cpu").config.data
    assert (chosen.fit, chosen.interpolation) == ("squash", "box")


def test_assumptions_are_noted_unless_given(tmp_path: Path) -> None:
    save_file(make_state("timm"), tmp_path / "bare.safetensors")
    bare, heads = tmp_path / "bare.safetensors", 3

    def note(**given: Any) -> str:
        notes = vitrail.load(bare, n_attention_heads=heads, device="cpu", **given).notes
        return " ".join(note for note in notes if "assumed" in note)

    assert note() == (
        "assumed, not in the files: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, fit crop, "
        "interpolation bilinear, crop_pct 1 (set by --mean, --std, --fit, --interpolation, "
        "--crop_pct)"
    )
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert note(**given).startswith("assumed, not in the files: fit crop")
    rest = {"fit": "pad", "interpolation": "box", "crop_pct": 1.0}
    assert note(**given, **rest) == ""
    folder = huggingface(tmp_path / "hf", None)
    assert any("fit squash" in note for note in vitrail.load(folder, device="cpu").notes)
    by_timm = vitrail.load(timm(tmp_path / "timm", {}), device="cpu")
    assert by_timm.mean == (0.485, 0.456, 0.406)
    assert any("mean 0.485 0.456 0.406" in note for note in by_timm.notes)


def test_wrong_settings_from_python_are_refused() -> None:
    with pytest.raises(TypeError, match="no argument 'dataset'"):
        vitrail.load("cifar10", dataset="folder", device="cpu")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="fit is 'stretch'"):
        vitrail.load("cifar10", fit="stretch", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"crop_pct 0\.5 crops"):
        vitrail.load("cifar10", fit="pad", crop_pct=0.5, device="cpu")


def model_file(path: Path, **data: Any) -> Path:
    """A Vitrail file, of a model that all layouts support."""
    model = ModelConfig(
        image_size=SIDE, patch_size=5, embed_dim=8, n_layers=1, n_attention_heads=2, n_classes=3,
        head="linear", layer_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    info = CheckpointInfo(Config(model=model, data=DataConfig(**data)), ("a", "b", "c"), {}, {})
    save_weights_file(path, info, VisionTransformer(model).state_dict())
    return path


SHAPES = ((75, 75), (195, 75), (75, 195), (119, 73))


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("fit", "crop_pct"), [("crop", 1), ("crop", 0.6), ("squash", 1), ("squash", 0.6)]
)
def test_exported_settings_prepare_pictures_as_vitrail_does(
    tmp_path: Path, layout: str, interpolation: str, fit: str, crop_pct: float
) -> None:
    """Equal to the byte if the others' steps end on integer pixels; else within one pixel."""
    colors = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    framing = {"fit": fit, "interpolation": interpolation, "crop_pct": crop_pct}
    source = model_file(tmp_path / "a.safetensors", **colors, **framing)
    assert main(["convert", str(source), str(tmp_path / "out"), "--layout", layout]) == 0
    classifier = vitrail.load(source, device="cpu")
    again = vitrail.load(tmp_path / "out", n_attention_heads=2, device="cpu").config.data
    assert {name: getattr(again, name) for name in framing} == pytest.approx(framing)
    assert again.mean == pytest.approx(colors["mean"])
    for hw in SHAPES:
        picture_HWC = noise(*hw)
        if layout == "timm":
            about = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
            theirs = prepared_by_timm(about, picture_HWC)
        else:
            path = tmp_path / "out" / "preprocessor_config.json"
            theirs = prepared_by_huggingface(json.loads(path.read_text()), picture_HWC)
        difference = np.abs(prepared_by_us(classifier, picture_HWC) - theirs)
        exact = fit == "squash" or hw in SHAPES[:3]
        print(f"{layout} {fit} {interpolation} {crop_pct} {hw}: {difference.max():.3f}")
        # 119 x 73 pixels become 24 (not 24.45) x 15, of which they skip 4 (not 4.73).
        assert difference.max() <= (2.01 / 255 / 0.224 if exact else steepest(theirs))


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
def test_settings_that_other_systems_lack_are_refused_with_the_flag(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model_file(tmp_path / "a.safetensors", fit="pad")
    words = ["convert", str(source), str(tmp_path / "out"), "--layout", layout]
    assert main(words) == 2
    assert "fit pad" in (refusal := capsys.readouterr().err)
    assert "--fit squash" in refusal
    assert not (tmp_path / "out").exists()
    assert main([*words, "--fit", "squash"]) == 0


def test_the_transformers_library_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = model_file(tmp_path / "a.safetensors", fit="crop", crop_pct=0.6)
    main(["convert", str(source), str(tmp_path / "out"), "--layout", "huggingface"])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(Image.fromarray(noise(75, 75)), return_tensors="np")["pixel_values"][0]
    ours = prepared_by_us(vitrail.load(source, device="cpu"), noise(75, 75))
    assert np.abs(theirs.transpose(1, 2, 0) - ours).max() < 0.02


def test_a_margin_is_cropped_from_every_picture_and_known_to_the_maps() -> None:
    framing = Framing("crop", "nearest", 0.5)
    picture_HWC = np.zeros((40, 80, 3), np.uint8)
    picture_HWC[10:30, 30:50] = 255
    assert seen_box((40, 80), (10, 10), framing) == (30, 10, 50, 30)
    assert (fit_picture(picture_HWC, (10, 10), framing) == 255).all()
    assert (fit_picture(picture_HWC[:, 20:60], (40, 40), framing) == 255).all()  # of its size, too
    assert seen_box((40, 80), (10, 10), Framing("squash", "box", 0.5)) == (20, 10, 60, 30)


def test_predict_explain_and_test_all_cut_the_margin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bright picture with a dark margin is, with the margin cut off, a bright one."""
    source = model_file(tmp_path / "a.safetensors")
    bright = np.full((40, 40, 3), 250, np.uint8)
    margin = bright.copy()
    margin[:10] = margin[30:] = 0
    margin[:, :10] = margin[:, 30:] = 0
    cut = vitrail.load(source, device="cpu", crop_pct=0.4, interpolation="nearest")
    complete = vitrail.load(source, device="cpu")
    wanted = complete.predict(bright)
    assert cut.predict(margin) == wanted
    assert complete.predict(margin) != wanted
    assert (cut.subject(margin).raw_HWC == 250).all()
    assert cut.subject(margin).fit.crop_pct == 0.4  # type: ignore[union-attr]
    Image.fromarray(margin).save(tmp_path / "x.png")
    words = ["predict", "--model_path", str(source), "--json", str(tmp_path / "x.png")]
    assert main([*words, "--crop_pct", "0.4", "--interpolation", "nearest"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    top = answer["predictions"][0]
    assert (top["class"], top["probability"]) == (wanted[0][0].name, wanted[0][0].probability)


@pytest.mark.parametrize(
    "command", ["predict", "test", "explain", "inspect", "export", "convert", "push"]
)
def test_every_command_that_loads_weights_has_the_flags(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    for flag in ("--mean", "--std", "--fit", "--interpolation", "--crop_pct"):
        assert flag in printed, flag


def test_the_flags_of_convert_are_written_into_the_file(tmp_path: Path) -> None:
    save_file(make_state("timm"), tmp_path / "bare.safetensors")
    words = ["convert", str(tmp_path / "bare.safetensors"), str(tmp_path / "b.safetensors")]
    flags = "--n_attention_heads 3 --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6 --fit squash"
    assert main([*words, *flags.split(), "--interpolation", "bicubic", "--crop_pct", "0.9"]) == 0
    data = load_weights_file(tmp_path / "b.safetensors")[0].config.data
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (data.fit, data.interpolation, data.crop_pct) == ("squash", "bicubic", 0.9)


def test_images_of_a_data_set_are_framed_once(tmp_path: Path) -> None:
    """--index takes an image that was framed when it was loaded."""
    from vitrail.data.datasets import load_data
    from vitrail.weights.pretrained import of_model_size

    config = DataConfig(dataset="shapes", crop_pct=0.5, num_test_images=4)
    raw_BCHW = load_data(config, ["test"]).images["test"].raw_BCHW
    plain = load_data(DataConfig(num_test_images=4), ["test"]).images["test"].raw_BCHW
    assert not torch.equal(raw_BCHW, plain)
    classifier = of_model_size(vitrail.load("cifar10", crop_pct=0.5, device="cpu"))
    raw_HWC = raw_BCHW[0].permute(1, 2, 0).numpy()
    assert np.array_equal(classifier.subject(raw_HWC).raw_HWC, raw_HWC)
