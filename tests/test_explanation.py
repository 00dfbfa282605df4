"""From a picture to frames: what each kind of frame holds, on the command line and in Python."""

import contextlib
import csv
import io
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import vitrail
from vitrail.cli import main
from vitrail.cli.explain import ExplainOptions
from vitrail.cli.explain import _print_failures as print_failures
from vitrail.cli.explain_files import name_files
from vitrail.cli.options import MODEL_ENDINGS, MODEL_FILES
from vitrail.cli.parsing import parse
from vitrail.config.drawing import Look
from vitrail.config.settings import Split
from vitrail.data.images import ImageSet
from vitrail.errors import ConfigError, DataError
from vitrail.explain.draw import caption, draw_sheet
from vitrail.explain.explanation import Subject, compare
from vitrail.explain.explanation import explain as draw
from vitrail.explain.map_settings import METHODS, MapSettings
from vitrail.explain.methods import attention_by_head, compute_maps, contributions_by_layer
from vitrail.explain.page import describe, page_data
from vitrail.explain.panels import BLACK, GREEN, RED, scales
from vitrail.explain.stored_scores import Badge, Verdict
from vitrail.inference.classifier import Classifier
from vitrail.training.run_folder import load_split
from vitrail.weights import checkpoint
from vitrail.weights.formats.convert import FILES

pytestmark = pytest.mark.usefixtures("rough_plots")

TINY = shlex.split(
    "--patch_size 8 --stem patch --embed_dim 16 --n_layers 3 --n_attention_heads 2 --batch_size 40 "
    "--num_train_images 80 --num_test_images 30 --validation_images 50 --device cpu --epochs 2 "
    "--keep_checkpoints 0"
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with both checkpoints."""
    output = tmp_path_factory.mktemp("runs")
    words = ["train", *TINY, "--output_path", str(output), "--folder_name", "a"]
    assert main(words) == 0
    return output / "a"


@pytest.fixture(scope="module")
def classifier(run_folder: Path) -> Classifier:
    return vitrail.load(run_folder, device="cpu")


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A picture that is larger than the model's and not square, in the current folder."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(4)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    small.resize((175, 125)).save(tmp_path / "cat.png")
    return "cat.png"


def frames_of(path: Path) -> list[np.ndarray]:
    """The frames of an animation as arrays."""
    with Image.open(path) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
    return frames


def explain(run_folder: Path, *words: str, out: str = "out.gif") -> list[np.ndarray]:
    """Draw with the command line and read the animation, or the picture, back."""
    command = ["explain", "--model_path", str(run_folder), *words, "--output_path", out]
    assert main(command) == 0
    return frames_of(Path(out))


# --- in Python ------------------------------------------------------------------------------------


def test_frames_hold_the_maps_of_their_method(classifier: Classifier, picture: str) -> None:
    images_1CHW = classifier.prepare(picture)
    for method in METHODS:
        explained = classifier.explain(picture, method=method)
        maps = compute_maps(classifier.model, images_1CHW, MapSettings(method=method))
        assert np.array_equal(explained.maps_FGJ, maps.values_BLGJ[0].numpy())
    rollout = classifier.explain(picture, fusion="max")
    assert rollout.titles == ("through layer 1", "through layer 2", "through layer 3")
    one = classifier.explain(picture, method="attention", layers=(2,))
    assert one.titles == ("layer 2",)


def test_heads_and_queries_are_grids(classifier: Classifier, picture: str) -> None:
    heads = classifier.explain(picture, frames="heads", layers=(1, 3), heads=(2,))
    by_head = attention_by_head(classifier.model, classifier.prepare(picture))[0]
    assert heads.titles == ("layer 1, head 2", "layer 3, head 2")
    assert np.array_equal(heads.maps_FGJ, by_head[[0, 2], 1].numpy())
    queries = classifier.explain(picture, frames="queries", layers=(2,))
    assert len(queries.titles) == 16
    fifth = classifier.explain(picture, method="attention", query=(1, 1), layers=(2,))
    np.testing.assert_allclose(queries.maps_FGJ[5], fifth.maps_FGJ[0], atol=1e-7)


def test_evidence_is_traced_back_to_the_stem(classifier: Classifier, picture: str) -> None:
    explained = classifier.explain(picture)
    layers = classifier.model.config.n_layers
    assert explained.titles == (*(f"after layer {n}" for n in range(layers, 0, -1)),
                                "before layer 1")  # fmt: skip
    assert all(frame.signed for frame in explained.frames)
    maps_LGJ = contributions_by_layer(
        classifier.model, explained.subject.image_1CHW, torch.tensor([explained.class_index])
    )[0]
    np.testing.assert_array_equal(explained.maps_FGJ, maps_LGJ.flip(0).numpy())
    against = next(
        name for name in classifier.classes if name not in explained.frames[0].prediction
    )
    other = classifier.explain(picture, against=against)
    assert not np.array_equal(other.maps_FGJ, explained.maps_FGJ)


def test_a_class_may_be_chosen(classifier: Classifier, picture: str) -> None:
    predictions = classifier.predict(picture, top_k=10)[0]
    top, last = predictions[0].name, predictions[-1].name
    default, first, other = (
        classifier.explain(picture, method="relevance", class_name=name)
        for name in (None, top, last)
    )
    assert np.array_equal(default.maps_FGJ, first.maps_FGJ)
    assert not np.array_equal(default.maps_FGJ, other.maps_FGJ)
    assert other.frames[0].prediction.startswith(top)
    assert f"explained: {last}" in other.frames[0].prediction


def count_pixels(drawn: np.ndarray, color: str) -> int:
    """Pixels of a text's full color, as far as a palette of 255 colors keeps it."""
    wanted = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
    return int((np.abs(drawn.astype(int) - wanted).max(axis=-1) < 24).sum())


@pytest.mark.parametrize("style", ["vitrail", "reference"])
@pytest.mark.parametrize("ending", ["gif", "png"])
def test_a_wrong_prediction_is_marked(
    ending: str, style: str, classifier: Classifier, picture: str, tmp_path: Path
) -> None:
    best, second = (p.name for p in classifier.predict(picture, top_k=2)[0])
    ends = {"": "%", best: "% ✓", second: f"% ✗ {second}"}
    inks = {"": BLACK["light"], best: GREEN["light"], second: RED["light"]}
    for label, end in ends.items():
        explained = draw(classifier.subject(picture, label=label), MapSettings(method="rollout"))
        assert all(frame.prediction.endswith(end) for frame in explained.frames)
        path = explained.save(tmp_path / f"x.{ending}", style=style)
        last = (
            frames_of(path)[-1] if ending == "gif" else np.asarray(Image.open(path).convert("RGB"))
        )
        below = last[-min(92, last.shape[1] // 12) :]  # prediction and caption, no map
        assert [name for name, ink in inks.items() if count_pixels(below, ink) > 60] == [label]


def test_every_kind_of_frame_knows_whether_it_is_right(
    classifier: Classifier, picture: str, run_folder: Path
) -> None:
    best, second = (p.name for p in classifier.predict(picture, top_k=2)[0])
    for label, right in (("", None), (best, True), (second, False)):
        subject = classifier.subject(picture, label=label)
        attention, rollout = MapSettings(), MapSettings(method="rollout")
        checkpoints = [("a", classifier.model), ("b", classifier.model)]
        explanations = [
            draw(subject, attention), draw(subject, MapSettings(method="occlusion")),
            draw(subject, attention, kind="heads"), draw(subject, attention, kind="queries"),
            draw(subject, rollout, kind="training", checkpoints=checkpoints),
            compare(subject, [attention, rollout]),
        ]  # fmt: skip
        for explained in explanations:
            assert {frame.correct for frame in explained.frames} == {right}, explained.kind


def test_a_page_names_the_label(classifier: Classifier, picture: str) -> None:
    best, second = (p.name for p in classifier.predict(picture, top_k=2)[0])
    for label, right in (("", False), (best, True), (second, False)):
        subject = classifier.subject(picture, label=label)
        shown = describe(page_data(draw(subject, MapSettings(method="rollout"))))
        assert (shown["label"], shown["right"]) == (label, right)


def test_a_caption_keeps_the_underscores_of_file_names(
    classifier: Classifier, picture: str
) -> None:
    subject = classifier.subject(picture, name="IMG_2041.JPG")
    explained = draw(subject, MapSettings(method="gradient_rollout"))
    assert caption(explained) == "IMG_2041.JPG: gradient rollout"


@pytest.mark.usefixtures("small_sheets")
@pytest.mark.parametrize("ending", ["gif", "webp", "png", "svg", "pdf", "html"])
def test_saving_writes_the_format_of_the_extension(
    ending: str, classifier: Classifier, picture: str, tmp_path: Path
) -> None:
    path = classifier.explain(picture).save(tmp_path / "new" / f"x.{ending}")
    head = path.read_bytes()[:200]
    magic = {
        "gif": b"GIF89a", "webp": b"RIFF", "png": b"\x89PNG", "html": b"<!doctype html>",
        "svg": b"<?xml", "pdf": b"%PDF",
    }  # fmt: skip
    assert head.lower().startswith(magic[ending].lower())
    if ending in ("gif", "webp"):  # the picture, four maps, and four frames before each
        assert 5 <= len(frames_of(path)) <= 21  # Pillow joins frames that are equal


def test_numbers_are_saved_as_they_are(
    classifier: Classifier, picture: str, tmp_path: Path
) -> None:
    explained = classifier.explain(picture, method="balanced")
    explained.save(tmp_path / "x.npz")
    stored = np.load(tmp_path / "x.npz")
    assert stored["titles_F"].tolist() == ["Balanced gradient"]
    assert stored["maps_FGJ"].shape[1:] == classifier.config.model.image_hw
    assert np.array_equal(stored["maps_FGJ"], explained.maps_FGJ)
    rolled = classifier.explain(picture)
    rolled.save(tmp_path / "x.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert len(rows) == rolled.maps_FGJ.size
    for row in rows:
        place = tuple(int(row[name]) for name in ("frame", "row", "column"))
        assert float(row["value"]) == pytest.approx(rolled.maps_FGJ[place], rel=1e-6)
        assert row["title"] == rolled.titles[place[0]]


def test_shapley_values_are_saved_and_shown_with_their_errors(
    classifier: Classifier, picture: str, tmp_path: Path
) -> None:
    explained = classifier.explain(picture, method="shapley", passes=100)
    errors_FGJ = explained.errors_FGJ
    assert errors_FGJ is not None
    assert errors_FGJ.shape == explained.maps_FGJ.shape
    assert errors_FGJ.min() > 0
    explained.save(tmp_path / "x.npz")
    assert np.array_equal(np.load(tmp_path / "x.npz")["errors_FGJ"], errors_FGJ)
    explained.save(tmp_path / "x.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    found = [float(row["standard_error"]) for row in rows]
    assert found == pytest.approx(errors_FGJ.ravel().tolist(), rel=1e-6)
    assert f"96 passes, standard error <= {errors_FGJ.max():.2g}" in caption(explained)
    assert len(describe(page_data(explained))["errors"]["shapley"]) == errors_FGJ.size
    single = classifier.explain(picture, method="shapley", passes=2)
    assert "standard error unknown" in caption(single)
    several = classifier.explain(picture, method="all")
    assert several.errors_FGJ is not None
    assert np.isnan(several.errors_FGJ[:-1]).all(), "other methods are no estimates"
    for method in ("shapley,relevance", "shapley,features"):
        settings = [MapSettings(method=name) for name in method.split(",")]  # type: ignore[arg-type]
        assert caption(compare(classifier.subject(picture), settings)).endswith(": 2 methods")
    assert classifier.explain(picture, method="balanced").errors_FGJ is None


def test_one_picture_is_in_memory_at_a_time(
    run_folder: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        shutil.copy(picture, name)
    events: list[str] = []
    monkeypatch.setattr(
        Classifier, "subject", lambda self, name, **more: events.append(f"read {name}")
    )
    monkeypatch.setattr(
        "vitrail.cli.explain._draw", lambda _, __, path, ___: events.append(f"draw {path.name}")
    )
    words = ["explain", "--model_path", str(run_folder), "--method", "gradcam", "--format", "npz"]
    assert main([*words, "a.png", "b.png"]) == 0
    expected = ["read a.png", "draw a-gradcam.npz", "read b.png", "draw b-gradcam.npz"]
    assert events == expected


def test_methods_that_fail_a_test_on_the_model_are_marked(
    classifier: Classifier, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Badge("relevance", 0.4, 0.3, 0.5, True, True, True)
    bad = Badge("rollout", 0.3, 0.2, 0.4, False, True, False)
    verdict = Verdict("validation", 300, (good, bad), "Trust relevance.")
    subject = replace(classifier.subject(picture), verdict=verdict)
    failing = draw(subject, MapSettings(method="rollout"))
    words = "no better than a control, does not depend on the class"
    assert caption(failing).endswith(f"rollout, fails a test on this model: {words}")
    assert "fails" not in caption(draw(subject, MapSettings(method="relevance")))
    unscored = MapSettings(method="rollout", fusion="max")
    assert "fails" not in caption(draw(subject, unscored)), "the score is of other settings"
    for other in ({"query": (0, 0)}, {"heads": (1,)}, {"layers": (1,)}):
        unscored = MapSettings(method="rollout", **other)  # type: ignore[arg-type]
        assert "fails" not in caption(draw(subject, unscored)), other
    last = MapSettings(method="rollout", layers=(classifier.config.model.n_layers,))
    assert "fails" in caption(draw(subject, last))
    queries = draw(subject, MapSettings(method="rollout"), kind="queries")
    assert "fails" not in caption(queries)
    balanced = verdict._replace(badges=(bad._replace(method="balanced"),))
    by_depth = draw(
        replace(subject, verdict=balanced), MapSettings(method="balanced"), kind="layers"
    )
    assert "fails" in caption(by_depth)
    against = MapSettings(method="balanced", against=1)
    contrast = draw(replace(subject, verdict=balanced), against, class_name="circle")
    assert "fails" not in caption(contrast)
    several = [MapSettings(method="rollout"), MapSettings(method="relevance")]
    both = compare(subject, several)
    titles = [axes.get_title(loc="left") for axes in draw_sheet(both, Look()).axes[1:3]]
    assert titles == ["✗ Rollout", "Relevance"]
    assert compare(subject, [MapSettings(method="occlusion", window=3)]).titles == (
        "Occlusion, window=3",
    )
    reference = MapSettings(method="rollout", layers=(1, 2))
    gradcam = MapSettings(method="gradcam", against=1)
    mixed = compare(subject, [reference, gradcam], class_name="circle")
    assert mixed.titles == ("Rollout, layers 1 2", "Grad-CAM")
    assert f"against {subject.classes[1]}" in caption(mixed)
    assert "✗: fails a test on this model" in caption(both)
    print_failures(both)
    print_failures(failing)
    assert capsys.readouterr().err.splitlines() == [
        "Rollout fails a test on this model (see vitrail info)",
        f"rollout fails a test on this model: {words}",
    ]


def test_hiding_patches_shows_its_progress_on_a_terminal(
    run_folder: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["explain", "--model_path", str(run_folder), picture, "--method"]
    for method in ("shapley", "occlusion", "rollout,occlusion"):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=100)
        monkeypatch.setattr("vitrail.cli.console.err", console)
        assert main([*words, method, "--output_path", "x.npz"]) == 0
        assert "hiding patches" in screen.getvalue()
        assert "100%" in screen.getvalue()


def test_signed_maps_have_zero_in_the_middle(classifier: Classifier, picture: str) -> None:
    signed = classifier.explain(picture, method="balanced")
    assert signed.frames[0].signed
    assert signed.maps_FGJ.min() < 0
    for how in ("frame", "picture", "none"):
        for norm in scales(signed.maps_FGJ, Look(normalize=how), [True]):  # type: ignore[arg-type]
            assert norm(0) == 0.5
            assert norm.vmin == -norm.vmax
    assert not classifier.explain(picture, method="rollout").frames[0].signed


def test_two_methods_with_pixels_are_compared_in_pixels(run_folder: Path, picture: str) -> None:
    words = ["explain", "--model_path", str(run_folder), picture, "--method"]
    for methods, side in (("balanced,integrated_gradients", 32), ("balanced,rollout", 4)):
        assert main([*words, methods, "--output_path", "x.npz"]) == 0
        assert np.load("x.npz")["maps_FGJ"].shape == (2, side, side)


def test_the_caption_names_gradients_and_points(classifier: Classifier, picture: str) -> None:
    relevance = classifier.explain(picture, method="relevance", gradients="balanced")
    assert "balanced gradients" in caption(relevance)
    averaged = classifier.explain(picture, method="balanced", points=3)
    assert "mean of 3 points" in caption(averaged)


def test_contrast_takes_the_name_of_a_class(classifier: Classifier, picture: str) -> None:
    names = classifier.classes
    one = classifier.explain(picture, method="balanced", class_name=names[0], against=names[1])
    other = classifier.explain(picture, method="balanced", class_name=names[1], against=names[0])
    np.testing.assert_allclose(one.maps_FGJ, -other.maps_FGJ, rtol=1e-3, atol=1e-6)
    assert caption(one).endswith(f"against {names[1]}")
    with pytest.raises(ConfigError, match="no class 'nothing'"):
        classifier.explain(picture, method="balanced", against="nothing")


def test_unknown_extensions_and_styles_are_refused(
    classifier: Classifier, picture: str, tmp_path: Path
) -> None:
    explained = classifier.explain(picture)
    with pytest.raises(ConfigError, match=r"ends in \.gif"):
        explained.save(tmp_path / "x.bmp")
    for look in ({"alpha": 2}, {"normalize": "all"}, {"colormap": "jet"}, {"style": "x"}):
        with pytest.raises(ConfigError):
            explained.save(tmp_path / "x.gif", **look)
    with pytest.raises(ConfigError, match="draws the rollout"):
        classifier.explain(picture, method="gradcam").save(tmp_path / "x.gif", style="reference")
    with pytest.raises(ConfigError, match="not a page"):
        explained.save(tmp_path / "x.html", style="reference")
    assert not list(tmp_path.glob("x.*"))


# --- on the command line --------------------------------------------------------------------------


@pytest.mark.usefixtures("small_sheets")
def test_it_prints_what_it_drew_and_where(
    run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["explain", "--model_path", str(run_folder), picture]) == 0
    shown = capsys.readouterr().out
    assert "cat-balanced-layers.gif: 4 maps, after layer 3 to before layer 1" in shown
    assert "cat.png: " in shown
    assert "%" in shown
    with Image.open("output/explain/cat-balanced-layers.gif") as image:
        assert image.n_frames > 5
        assert image.info["duration"] == 500
        assert image.info["loop"] == 0


@pytest.mark.usefixtures("small_sheets")
def test_every_flag_changes_what_is_drawn(run_folder: Path, picture: str) -> None:
    last = explain(run_folder, picture, out="out.png")[-1]
    changes = (
        "--method relevance", "--method attention", "--method gradcam", "--frames heads",
        "--query 0,3", "--heads 1", "--fusion max", "--discard_ratio 0.8", "--normalize picture",
        "--normalize none", "--colormap viridis", "--alpha 0.2", "--style reference",
        "--fit squash",
        "--layers 1-2", "--method rollout,relevance",
    )  # fmt: skip
    seen = [last]
    for change in changes:
        other = explain(run_folder, picture, *shlex.split(change), out="out.png")[-1]
        for before in seen:
            assert before.shape != other.shape or not np.array_equal(before, other), change
        seen.append(other)


@pytest.mark.usefixtures("small_sheets")
def test_frames_durations_and_loops_are_as_asked(run_folder: Path, picture: str) -> None:
    assert len(explain(run_folder, picture, "--frames", "heads")) == 7
    assert len(explain(run_folder, picture, "--frames", "queries")) == 17
    assert len(explain(run_folder, picture, "--frames", "training")) >= 3
    assert len(explain(run_folder, picture, "--method", "all")) == 10
    explain(run_folder, picture, "--duration", "120", "--loop", "3")
    with Image.open("out.gif") as image:
        assert image.info["duration"] == 120
        assert image.info["loop"] == 3


def test_the_still_panel_is_constant(run_folder: Path, picture: str) -> None:
    for style in ("vitrail", "reference"):
        frames = np.stack(explain(run_folder, picture, "--style", style)).astype(int)
        left = frames[:, 60:300, 30:300]
        assert np.ptp(left, axis=0).max() <= 1
        assert np.ptp(frames[:, :, 420:], axis=0).max() > 20


@pytest.mark.usefixtures("small_sheets")
def test_several_pictures_go_into_a_folder(
    run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("more").mkdir()
    shutil.copy(picture, "more/cat.png")
    Path("more/broken.png").write_text("x")
    words = ["explain", "--model_path", str(run_folder), picture, "more", "--format", "png"]
    assert main([*words, "--output_path", "drawn"]) == 1
    names = sorted(path.name for path in Path("drawn").iterdir())
    assert names == ["cat-balanced-layers-2.png", "cat-balanced-layers.png"]
    assert "broken.png" in capsys.readouterr().err


@pytest.mark.usefixtures("small_sheets")
def test_an_image_of_the_data_is_explained_with_its_label(
    run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", "--model_path", str(run_folder), "--index", "3", "--format", "png"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "validation-3: " in shown
    assert "✓" in shown or "✗" in shown


@pytest.mark.usefixtures("small_sheets")
def test_every_use_of_the_test_split_is_logged_in_the_run(run_folder: Path, picture: str) -> None:
    log = run_folder / "test_uses.jsonl"
    before = log.read_text()
    commands = {
        "image 3 explained": "explain --index 3 --format png",
        "vitrail explain --score": "explain --score --images 10 --method attention",
        "vitrail inspect": "inspect --images 10",
    }
    for words in commands.values():
        assert main([*shlex.split(words), "--model_path", str(run_folder)]) == 0
    assert log.read_text() == before
    for words in commands.values():
        command = [*shlex.split(words), "--split", "test", "--model_path", str(run_folder)]
        assert main(command) == 0
    added = log.read_text().removeprefix(before).splitlines()
    assert [json.loads(line)["purpose"] for line in added] == list(commands)
    assert not list(Path().rglob("test_uses.jsonl"))


@pytest.mark.parametrize("words", ["explain --index 0", "explain --score", "inspect"])
def test_data_other_than_the_training_data_is_named(
    words: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint names its training data, to which other data is compared."""

    calls = []

    def ask(classifier: Classifier, split: str, **changes: object) -> None:
        calls.append((split, changes, classifier.config.data))
        raise DataError("enough")

    monkeypatch.setattr("vitrail.training.run_folder.load_split", ask)
    command = f"{words} --dataset folder --data_path other --split train --model_path {run_folder}"
    assert main(shlex.split(command)) == 2
    trained = vitrail.load(run_folder, device="cpu").config.data
    changes = {"dataset": "folder", "data_path": Path("other"), "num_test_images": None}
    assert calls == [("train", changes, trained)]


@pytest.mark.parametrize("command", ["explain", "predict"])
@pytest.mark.parametrize("what", ["run", "checkpoint", "weights", "bundled"])
def test_a_model_among_the_pictures_is_refused(
    command: str, what: str, run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = next((run_folder / "checkpoints").glob("step-*"))
    words = {
        "run": run_folder, "checkpoint": checkpoint, "weights": checkpoint / "model.safetensors",
        "bundled": "cifar10",
    }  # fmt: skip
    capsys.readouterr()
    assert main([command, picture, str(words[what])]) == 2
    line = f"{words[what]} is a model, not a picture: name it first"
    assert capsys.readouterr().err == f"vitrail: {line}\n"


def test_all_extensions_of_models_are_known() -> None:
    assert set(MODEL_ENDINGS) == {*FILES, ".onnx", ".pt2"}
    assert set(MODEL_FILES) >= {checkpoint.INFO, checkpoint.MODEL}


def test_a_search_skips_the_plots_of_runs(
    run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_folder, "all/runs/a")
    Image.new("RGB", (9, 9)).save("all/runs/a/plot.png")
    words = ["predict", "all", "--model_path", str(run_folder), "--json"]
    assert main(words) == 2
    assert "its only pictures are the plots of runs" in capsys.readouterr().err
    shutil.copy(picture, "all/cat.png")
    assert main(words) == 0
    captured = capsys.readouterr()
    assert [answer["picture"] for answer in json.loads(captured.out)] == ["all/cat.png"]
    assert "plots of runs" in captured.err
    assert main(["predict", "all/runs/a/plot.png", "--model_path", str(run_folder)]) == 0


@pytest.mark.usefixtures("small_sheets")
def test_a_picture_on_standard_input_is_explained(
    run_folder: Path, picture: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stdin = io.TextIOWrapper(io.BytesIO(Path(picture).read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    capsys.readouterr()
    assert main(["explain", "-", "--model_path", str(run_folder)]) == 0
    assert capsys.readouterr().out.startswith("stdin: ")
    assert Path("output/explain/stdin-balanced-layers.gif").exists()


def test_drawings_with_other_settings_have_other_names() -> None:
    flags = [
        "", "--style reference", "--query 0,3", "--query 03", "--layers 1-2", "--layers 1,2",
        "--method attention", "--method attention --frames heads", "--frames heads",
        "--method relevance --class ring", "--method rollout,relevance", "--fusion max",
        "--discard_ratio 0.5", "--fit squash", "--alpha 0.2", "--colormap viridis",
        "--normalize none", "--duration 100", "--loop 2", "--format png", "--format html",
        "--format html --class ring",
    ]  # fmt: skip
    names = []
    for each in flags:
        options = parse(ExplainOptions, ["cat.png", *shlex.split(each)], prog="vitrail explain")
        names += [path.as_posix() for path in name_files(options, ["cat.png"])]
    assert names[0] == "output/explain/cat-balanced-layers.gif"
    assert names[2] == "output/explain/cat-rollout-query-0-3.gif"
    assert names[-2:] == ["output/explain/cat.html", "output/explain/cat-class-ring.html"]
    # "1-2" and "1,2" are the same layers, which may share a name; all others differ.
    assert len(set(names)) == len(names) - 1


@pytest.mark.parametrize(
    ("path", "file"),
    [("results/v1.2", False), ("a.b", False), ("x.gif", True), ("x.PNG", True), ("x.bmp", True),
     ("x.pdf", True), ("there.gif", False), ("n" * 500 + ".gif", True)],
)  # fmt: skip
def test_an_output_path_is_a_file_only_by_a_known_ending(
    path: str, file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.gif").mkdir()
    options = ExplainOptions(pictures=("cat.png",), output_path=Path(path))
    (named,) = name_files(options, ["cat.png"])
    assert named == (Path(path) if file else Path(path) / "cat-balanced-layers.gif")
    assert options.folder == (Path(path).parent if file else Path(path))


@pytest.mark.usefixtures("small_sheets")
def test_what_was_drawn_is_counted(
    run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", "--model_path", str(run_folder), picture]
    assert main([*words, "--method", "all", "--format", "png"]) == 0
    assert main([*words, "--method", "gradcam"]) == 0
    shown = capsys.readouterr().out
    assert ": 9 maps, Attention to Shapley values, " in shown
    assert ": 1 map, Grad-CAM, " in shown


def test_scores_are_printed_drawn_and_saved(
    run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", "--model_path", str(run_folder), "--score", "--images", "12"]
    assert main([*words, "--method", "rollout,relevance", "--output_path", "s"]) == 0
    shown = capsys.readouterr().out
    for name in ("rollout", "relevance", "random", "center"):
        assert name in shown
    scores = json.loads(Path("s/scores.json").read_text())
    assert [each["method"] for each in scores["scores"]] == [
        "rollout", "relevance", "random", "blurred random", "center",
    ]  # fmt: skip
    assert scores["images"] == 12
    assert Path("s/scores.png").stat().st_size > 1000
    assert Path("s/ranking.png").stat().st_size > 1000
    assert main([*words, "--method", "rollout", "--output_path", "s", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("s/scores.json").read_text())


def test_images_sorted_by_class_are_scored_in_mixed_order(
    run_folder: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_sorted(classifier: Classifier, split: Split, **changes: Any) -> ImageSet:
        images = load_split(classifier, split, **changes)
        return images.take(images.labels_B.sort(stable=True).indices)

    seen = []

    def check(_: object, __: object, labels_B: Tensor, *___: object, **____: object) -> None:
        seen.extend(labels_B.tolist())
        raise ConfigError("enough")

    monkeypatch.setattr("vitrail.training.run_folder.load_split", load_sorted)
    monkeypatch.setattr("vitrail.explain.sanity.check_methods", check)
    words = ["explain", "--model_path", str(run_folder), "--score", "--images", "20"]
    assert main([*words, "--method", "attention"]) == 2
    assert len(set(seen[:8])) > 3
    assert seen != sorted(seen)


def test_variants_are_scored_and_compared(run_folder: Path, picture: str) -> None:
    words = ["explain", "--model_path", str(run_folder), "--score", "--images", "10"]
    names = "occlusion,occlusion:window=1,occlusion:window=2,rollout:fusion=norm"
    assert main([*words, "--method", names, "--output_path", "s"]) == 0
    found = json.loads(Path("s/scores.json").read_text())
    expected = {"occlusion", "occlusion:window=1", "rollout:fusion=norm"}
    assert {each["method"] for each in found["checks"]} == expected
    failures = {badge["method"]: badge["depends_on_class"] for badge in found["badges"]}
    assert failures["rollout:fusion=norm"] is False
    pairs = {name for high, lower in found["differences"].items() for name in (high, *lower)}
    assert pairs == {score["method"] for score in found["scores"]}
    assert not (run_folder / "scores.json").exists(), "only a verdict on all methods is stored"


def test_a_verdict_on_all_methods_is_shown_with_the_model_until_it_is_trained_on(
    run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model_path", str(run_folder)]
    assert main(["info", str(run_folder)]) == 0
    assert f"maps not scored: vitrail explain --score --model_path {run_folder}" in (
        capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    )
    assert main(["explain", *model, "--score", "--images", "10", "--output_path", "s"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    verdict = json.loads((run_folder / "scores.json").read_text())
    assert verdict["trust"] in shown
    assert "ceiling, 10 images" in shown
    assert "scores" not in verdict, "only the report holds all numbers"
    assert main(["info", str(run_folder)]) == 0
    assert verdict["trust"] in " ".join(capsys.readouterr().out.split())
    assert main(["explain", *model, picture, "--format", "html", "--output_path", "page"]) == 0
    page = next(Path("page").glob("*.html")).read_text()
    assert '"badges":{"' in page
    verdict["weights"] = "0" * 64
    (run_folder / "scores.json").write_text(json.dumps(verdict))
    assert main(["explain", *model, picture, "--format", "html", "--output_path", "page"]) == 0
    assert '"badges":{}' in next(Path("page").glob("*.html")).read_text()
    (run_folder / "scores.json").unlink()


def test_scores_are_written_before_they_are_printed(
    run_folder: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise UnicodeEncodeError("cp1252", "✓", 0, 1, "no such character")

    monkeypatch.setattr("vitrail.cli.score.out.print", fail)
    words = ["explain", "--model_path", str(run_folder), "--score", "--images", "10"]
    with contextlib.suppress(UnicodeEncodeError):
        main([*words, "--method", "attention", "--output_path", "s"])
    assert json.loads(Path("s/scores.json").read_text())["images"] == 10


def test_scoring_shows_its_progress_on_a_terminal(
    run_folder: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("vitrail.cli.console.err", console)
    words = ["explain", "--model_path", str(run_folder), "--score", "--images", "10"]
    assert main([*words, "--method", "attention", "--output_path", "s"]) == 0
    assert "scoring" in screen.getvalue()
    assert "100%" in screen.getvalue()


def test_inspections_are_printed_drawn_and_saved(
    run_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(run_folder), "--images", "15", "--output_path", "i"]
    assert main(words) == 0
    assert "mean distance" in capsys.readouterr().out
    assert Path("i/insides.png").stat().st_size > 1000
    assert main([*words, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert torch.tensor(numbers["attention_entropy_nats"]).shape == (3, 2)
    assert numbers == json.loads(Path("i/insides.json").read_text())


def test_without_data_filters_and_positions_are_inspected(
    picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DataError("CIFAR-10 could not be downloaded")

    monkeypatch.setattr("vitrail.data.datasets.load_cifar", fail)
    words = ["inspect", "--model_path", "cifar10", "--output_path", "i"]
    assert main([*words, "--json"]) == 1
    captured = capsys.readouterr()
    numbers = json.loads(captured.out)
    assert "similarity_to_middle_patch" in numbers
    assert "attention_entropy_nats" not in numbers
    assert "filters and positions only" in captured.err
    assert "CIFAR-10 could not be downloaded" in captured.err
    assert Path("i/insides.png").stat().st_size > 1000
    assert main([*words, "--dataset", "cifar10"]) == 2  # a given data path must exist


@pytest.mark.parametrize("images", [9, 0, -3])
def test_too_few_images_to_inspect_are_refused_before_anything_is_loaded(
    images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "nothing", "--images", str(images)]) == 2
    assert capsys.readouterr().err == f"vitrail: --images is {images}: give at least 10\n"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("", ["no picture given"]),
        ("cat.png --index 3", ["give one"]),
        ("--index -1", ["--index is -1", "0 to 49"]),
        ("--score --images 0", ["--images is 0", "at least 10"]),
        ("--score --images -3", ["--images is -3", "at least 10"]),
        ("--score --output_path x.png", ["x.png is a file", "give a folder"]),
        ("cat.png --layers 3-1", ["--layers is '3-1'"]),
        ("cat.png --layers ''", ["--layers is ''"]),
        ("cat.png --heads ','", ["--heads is ','"]),
        ("cat.png --heads 0", ["head 0", "1 to 2"]),
        ("cat.png --layers 1-99999", ["--layers is '1-99999'"]),
        ("cat.png --method ''", ["no method ''"]),
        ("cat.png --class '' --method relevance", ["no class ''"]),
        ("cat.png --query ''", ["--query is ''"]),
        ("cat.png --alpha nan", ["alpha is nan"]),
        ("cat.png --alpha -0.1", ["alpha is -0.1"]),
        ("cat.png --discard_ratio 1", ["discard_ratio is 1"]),
        ("cat.png --discard_ratio nan", ["discard_ratio is nan"]),
        ("cat.png --duration -5", ["duration is"]),
        ("cat.png --loop -1", ["loop is -1"]),
        ("cat.png --n_attention_heads 0", ["2 attention heads, not 0"]),
        ("''", ["''"]),
        ("cat.png --layers 4", ["layer 4", "1 to 3"]),
        ("cat.png --layers 0", ["layer 0", "1 to 3"]),
        ("cat.png --layers x", ["--layers is 'x'"]),
        ("cat.png --frames heads --heads 3", ["head 3", "1 to 2"]),
        ("cat.png --images 20", ["--score", "leave out --images"]),
        ("cat.png --split test --dataset shapes", ["leave out --dataset, --split"]),
        ("cat.png --style reference --alpha 0.1", ["style reference", "leave out --alpha"]),
        (
            "cat.png --method balanced --frames layers --resolution patch",
            ["one value per patch", "leave out resolution"],
        ),
        (
            "--model_path cifar10 --score --dataset shapes",
            ["shapes has the classes circle, ring", "the model plane, car"],
        ),
        (
            "--score --window 3 --class ring --alpha 0.5",
            ["--method METHOD:NAME=VALUE", "leave out --class, --window, --alpha"],
        ),
        ("--score --method occlusion:windows=1", ["did you mean 'window'", "occlusion:window=1"]),
        ("--score --method occlusion:window=x", ["window is 'x', not a number"]),
        ("--score --method rollout:window=1", ["window has no effect on method rollout"]),
        ("--score --method oclusion:window=1", ["did you mean 'occlusion'"]),
        ("--score --method norms:layers=1", ["norms:layers=1"]),
        ("--score --method norms", ["norms shows the tokens"]),
        ("cat.png --method occlusion:window=1", ["only --score", "give --window 1"]),
        ("cat.png --format npz --alpha 0.5", [".npz holds the numbers", "leave out --alpha"]),
        ("cat.png --format png --duration 90", [".png is not animated", "leave out --duration"]),
        ("cat.png --method rollout,gradcam --window 3", ["leave out --window"]),
        ("cat.png --frames queries --layers 1,2", ["layers is (1, 2)", "give a single layer"]),
        ("cat.png --method balanced --class ring --against ring", ["both 'ring'"]),
        ("cat.png --fusion max --class ring", ["same for every class"]),
        ("cat.png --method balanced --colormap viridis", ["colormap", "signed"]),
        ("cat.png --method features --colormap viridis", ["colormap", "(features)"]),
        ("cat.png --format html --layers 1 --alpha 0.5", ["leave out --layers, --alpha"]),
        ("cat.png --method relevance --class rung", ["no class 'rung'", "did you mean 'ring'"]),
        ("cat.png --query 4,0", ["outside the picture's 4 x 4 patches"]),
        ("cat.png --query 4", ["--query is '4'"]),
        ("cat.png --method rolout", ["no method 'rolout'", "did you mean 'rollout'"]),
        ("cat.png --method gradcam --query 1,1", ["query has no effect on method gradcam"]),
        ("cat.png --method gradcam --frames layers", ["frames layers cannot show method gradcam"]),
        ("cat.png --method all --frames layers", ["leave out --frames"]),
        ("cat.png --frames laiers", ["did you mean 'layers'"]),
        ("cat.png --colormap jet", ["'jet' for argument '--colormap'"]),
        ("cat.png --duration 1", ["duration is"]),
        ("cat.png --format gif --output_path x.png", ["--format gif contradicts x.png"]),
        ("cat.png --output_path x.bmp", ["x.bmp"]),
        ("cat.png cat.png --output_path x.gif", ["2 pictures do not fit into one file"]),
        ("none.png", ["none.png"]),
        ("bad.png", ["bad.png"]),
        ("--index 50", ["give 0 to 49"]),
        ("--score --images 3", ["3"]),
    ],
)
def test_invalid_explanations_are_one_line(
    flags: str, parts: list[str], run_folder: Path, picture: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Path("bad.png").write_text("x")
    capsys.readouterr()
    assert main(["explain", "--model_path", str(run_folder), *shlex.split(flags)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vitrail: ")
    for part in parts:
        assert part in line


def test_frames_of_training_are_the_maps_of_each_checkpoint(make_model: Any) -> None:
    models = [make_model(), make_model(dropout=0.0)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(-0.5)
    raw_HWC = np.random.default_rng(2).integers(0, 256, (20, 28, 3), np.uint8)
    image_1CHW = torch.from_numpy(raw_HWC).permute(2, 0, 1)[None] / 128 - 1
    subject = Subject(models[1], image_1CHW, raw_HWC, raw_HWC, "crop", tuple("abcdefg"))
    settings = MapSettings(method="rollout")
    found = draw(
        subject,
        settings,
        kind="training",
        checkpoints=[("epoch 1", models[0]), ("epoch 2", models[1])],
    )
    assert found.titles == ("epoch 1", "epoch 2")
    for frame, model in zip(found.frames, models, strict=True):
        maps = compute_maps(model, image_1CHW, settings)
        np.testing.assert_array_equal(frame.map_GJ, maps.values_BLGJ[0, -1].numpy())
        assert frame.prediction.startswith("abcdefg"[int(maps.logits_BY[0].argmax())])
    assert not np.array_equal(found.frames[0].map_GJ, found.frames[1].map_GJ)
