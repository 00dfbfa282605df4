"""Reported problems, reproduced from the command line: a correct result or a one-line error.

Minutes long: ``pytest -m slow tests/test_reproductions.py``.
"""

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.data.images import normalize
from vitrail.data.pictures import read_picture
from vitrail.data.shapes import load_shapes
from vitrail.errors import PictureError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Result = subprocess.CompletedProcess[str]
QUICK = ("--preset", "quick", "--precision", "float32", "--epochs", "1")


def draw(folder: Path, count: int, classes: int = 10) -> Path:
    """Folders of shapes."""
    shapes = load_shapes("train")
    for label, name in enumerate(shapes.classes[:classes]):
        (folder / name).mkdir(parents=True, exist_ok=True)
        indices = (shapes.labels_B == label).nonzero().flatten()[:count].tolist()
        for number, index in enumerate(indices):
            picture = shapes.raw_BCHW[index].permute(1, 2, 0).numpy()
            Image.fromarray(picture).save(folder / name / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def pics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("pics") / "pics", 40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pics: Path) -> Path:
    """R1's run: a subset of the pictures."""
    folder = tmp_path_factory.mktemp("r1")
    done = call("train", *QUICK, "--dataset", "folder", "--data_path", pics, "--num_train_images",
                100, "--num_test_images", 8, "--folder_name", "r1", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "output/r1"


def call(*words: object, cwd: Path, env: dict[str, str] | None = None, **options: object) -> Result:
    """Run a command; there is never a traceback."""
    done = subprocess.run(  # type: ignore[call-overload]
        [sys.executable, "-m", "vitrail", *map(str, words)],
        cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False,
        errors="backslashreplace", **options,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def train(folder: Path, name: str, *words: object, **options: object) -> Result:
    return call("train", *QUICK, "--folder_name", name, *words, cwd=folder, **options)  # type: ignore[arg-type]


def refused(done: Result, message: str, code: int = 2) -> None:
    """It ended with one line that contains the message."""
    assert message in done.stderr, done.stderr
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith("vitrail: ")


def supports(run: Path) -> list[int]:
    result = json.loads((run / "result.json").read_text())
    return [row["support"] for row in result["test"]["per_class"]]


def test_r1_subsets_have_every_class(run: Path) -> None:
    assert supports(run) == [1] * 8 + [0] * 2
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["classes"]) == 10


def test_r2_split_folders_are_not_classes(pics: Path, tmp_path: Path) -> None:
    for split in ("Training", "Testing"):
        for name in ("heart", "ring", "star"):
            shutil.copytree(pics / name, tmp_path / "mri" / split / name)
    done = train(tmp_path, "r2", "--dataset", "folder", "--data_path", "mri")
    assert "mri: 3 classes, 240 pictures" in done.stderr
    assert supports(tmp_path / "output/r2") == [40, 40, 40]


def test_r3_all_of_another_folder_is_scored(run: Path, tmp_path: Path) -> None:
    held_out = draw(tmp_path / "held-out", 60, 3)
    for folder in held_out.iterdir():  # other pictures than those that were trained on
        for path in sorted(folder.iterdir())[:40]:
            path.unlink()
    done = call("test", "--model_path", run, "--data_path", held_out, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["images"] == 60


def test_r4_a_changed_folder_is_refused_with_what_changed(tmp_path: Path) -> None:
    draw(tmp_path / "ren", 40, 3)
    train(tmp_path, "r4", "--dataset", "folder", "--data_path", "ren")
    (tmp_path / "output/r4/result.json").unlink()
    (tmp_path / "ren/circle").rename(tmp_path / "ren/zcircle")
    for words in (("train", "--resume", "output/r4"), ("test", "--model_path", "output/r4")):
        refused(call(*words, cwd=tmp_path), "missing (circle/")
    (tmp_path / "ren/zcircle").rename(tmp_path / "ren/circle")
    draw(tmp_path / "ren", 60, 4)
    done = call("train", "--resume", "output/r4", cwd=tmp_path)
    assert done.returncode == 0
    assert "ignored 120 pictures that were added since the run began" in done.stderr


def test_r5_a_frozen_backbone_does_not_change(pics: Path, tmp_path: Path) -> None:
    train(tmp_path, "r5", "--init", "cifar10", "--new_head", "--freeze_backbone",
          "--dataset", "folder", "--data_path", pics)  # fmt: skip
    before, after = (
        vitrail.load(name, device="cpu").model for name in ("cifar10", tmp_path / "output/r5")
    )
    kept = dict(after.named_buffers()) | dict(after.named_parameters())
    for name, tensor in (*before.named_buffers(), *before.named_parameters()):
        assert name.startswith("head.") or torch.equal(kept[name], tensor), name


def test_r6_wide_gray_values_keep_their_levels(tmp_path: Path) -> None:
    gray = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    for values in ((gray * 4095).astype("uint16"), (gray * 255).astype("uint16"),
                   (gray * 255).astype("int32"), gray, gray * np.float32(1.004)):  # fmt: skip
        Image.fromarray(values).save(tmp_path / "x.tif")
        read = read_picture(tmp_path / "x.tif")
        assert (read.min(), read.max()) == (0, 255)
        assert len(np.unique(read)) >= 250


def test_r7_arrays_are_read_or_refused(pics: Path) -> None:
    classifier = vitrail.load("cifar10", device="cpu")
    array = np.asarray(Image.open(pics / "star/0001.png"))
    (top,) = classifier.predict(array, top_k=1)
    same = {
        "float32": array.astype("float32") / 255,
        "float64": array / 255,
        "RGBA": np.dstack([array, np.full_like(array[..., :1], 255)]),
        "CHW": array.transpose(2, 0, 1),
        "tensor": torch.from_numpy(array.transpose(2, 0, 1).copy()),
        "file": io.BytesIO((pics / "star/0001.png").read_bytes()),
    }
    for name, picture in same.items():
        (found,) = classifier.predict(picture, top_k=1)
        assert found[0].name == top[0].name, name
        assert found[0].probability == pytest.approx(top[0].probability, abs=0.01), name
    assert len(classifier.predict(np.stack([array, array]))) == 2
    for wrong in (array.astype("uint16") * 257, array.astype("float32"), None, 3):
        with pytest.raises(PictureError) as error:
            classifier.predict(wrong)  # type: ignore[arg-type]
        assert len(str(error.value)) < 300


@pytest.fixture(scope="module")
def r8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("r8")
    train(folder, "r8", "--stem", "patch", "--position", "learned", "--head", "linear",
          "--pool", "cls", "--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225,
          "--num_train_images", 1000)  # fmt: skip
    for layout in ("timm", "huggingface"):
        done = call("convert", "output/r8", f"r8-{layout}", "--layout", layout, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def logits(path: Path, **options: object) -> torch.Tensor:
    classifier = vitrail.load(path, device="cpu", **options)  # type: ignore[arg-type]
    raw_BCHW = load_shapes("test").raw_BCHW[:50]
    with torch.inference_mode():
        return classifier.model(normalize(raw_BCHW, classifier.mean, classifier.std))


def test_r8_assumed_preprocessing_is_reported_and_can_be_set(r8: Path) -> None:
    shutil.copy(r8 / "r8-timm/model.safetensors", r8 / "bare.safetensors")
    done = call("convert", "bare.safetensors", "mine.safetensors", "--n_attention_heads", 4, cwd=r8)
    assert "mean" in done.stdout + done.stderr
    done = call("convert", "bare.safetensors", "right.safetensors", "--n_attention_heads", 4,
                "--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225, cwd=r8)  # fmt: skip
    assert done.returncode == 0, done.stderr
    right = vitrail.load(r8 / "right.safetensors")
    assert (right.mean, right.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    wanted = logits(r8 / "output/r8")
    for path in (r8 / "right.safetensors", r8 / "r8-timm"):  # timm's norms have another epsilon
        torch.testing.assert_close(logits(path), wanted, rtol=0.01, atol=0.01)
    assert (logits(r8 / "mine.safetensors") - wanted).abs().max() > 0.05


def test_r9_the_processor_of_hugging_face_is_read_completely(r8: Path) -> None:
    path = r8 / "r8-huggingface/preprocessor_config.json"
    processor = json.loads(path.read_text())
    assert processor["resample"] == 2  # bilinear
    assert vitrail.load(r8 / "r8-huggingface").mean == pytest.approx((0.485, 0.456, 0.406))
    path.write_text(json.dumps(processor | {"do_normalize": False}))
    raw = vitrail.load(r8 / "r8-huggingface")
    assert (raw.mean, raw.std) == ((0, 0, 0), (1, 1, 1))


def test_r10_a_missing_test_split_is_reported_before_training(pics: Path, tmp_path: Path) -> None:
    shutil.copytree(pics, tmp_path / "im/train")
    shutil.copytree(pics, tmp_path / "im/val")
    done = train(tmp_path, "r10", "--dataset", "folder", "--data_path", "im")
    assert done.returncode == 0
    assert "There is no test split: the run will have no test score" in done.stderr
    assert json.loads((tmp_path / "output/r10/result.json").read_text())["train_images"] == 400
    (tmp_path / "im/test/unknown").mkdir(parents=True)
    shutil.copy(pics / "star/0001.png", tmp_path / "im/test/unknown")
    done = train(tmp_path, "r10b", "--dataset", "folder", "--data_path", "im")
    refused(done, "class 'unknown' is not among the training classes")
    assert not (tmp_path / "output/r10b").exists()


def test_r11_hidden_folders_are_skipped(pics: Path, tmp_path: Path) -> None:
    shutil.copytree(pics, tmp_path / "chk")
    for folder in pics.iterdir():
        shutil.copytree(folder, tmp_path / "chk" / folder.name / ".ipynb_checkpoints")
    done = train(tmp_path, "r11", "--dataset", "folder", "--data_path", "chk")
    assert "chk: 10 classes, 400 pictures" in done.stderr


def test_r12_links_are_followed_and_skipped_files_are_reported(pics: Path, tmp_path: Path) -> None:
    for name in ("bar", "star"):
        shutil.copytree(pics / name, tmp_path / "lnk" / name)
        for number, path in enumerate(sorted((tmp_path / "lnk" / name).iterdir())):
            if number >= 10:
                path.rename(path.with_suffix(".mp4" if number >= 30 else ".jpe"))
    (tmp_path / "lnk/bar/batch").symlink_to(pics / "ring")
    done = train(tmp_path, "r12", "--dataset", "folder", "--data_path", "lnk")
    assert "lnk: 2 classes, 120 pictures" in done.stderr  # content, not endings
    for path in (tmp_path / "lnk").glob("*/*.mp4"):
        path.write_bytes(b"\0\0\0\x18ftypmp42")
    done = train(tmp_path, "r12b", "--dataset", "folder", "--data_path", "lnk")
    assert "lnk: 2 classes, 100 pictures" in done.stderr
    assert "20 .mp4" in done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_r13_no_character_stops_a_command(
    run: Path, pics: Path, tmp_path: Path, encoding: str
) -> None:
    env = {"PYTHONIOENCODING": encoding}
    shutil.copytree(pics / "bar", tmp_path / "uni/猫")
    shutil.copytree(pics / "star", tmp_path / "uni/dog")
    train(tmp_path, "r13", "--dataset", "folder", "--data_path", "uni", env=env)
    model = ("--model_path", "output/r13")
    for words in (("predict", "uni/猫/0001.png", "--csv", *model), ("test", *model),
                  ("info", "output/r13"), ("explain", "uni/猫/0001.png", *model)):  # fmt: skip
        assert call(*words, cwd=tmp_path, env=env).returncode == 0, words
    done = call("explain", "--score", "--split", "train", "--images", 20, "--model_path", run,
                "--output_path", "sc", cwd=tmp_path, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sc/scores.json").is_file()


@pytest.mark.parametrize("words", [("--batch_size", 9), ("--batch_size", 4, "--accumulate", 4)])
def test_r14_batches_of_one_image_of_one_patch(tmp_path: Path, words: tuple[object, ...]) -> None:
    done = train(tmp_path, "r14", "--image_size", 8, "--patch_size", 8, "--num_train_images", 100,
                 *words)  # fmt: skip
    assert done.returncode in (0, 2), done.stderr


def test_r15_counts(run: Path, cifar_folder: Path, tmp_path: Path) -> None:
    done = train(tmp_path, "r15", "--num_workers", 0, "--num_train_images", 100)
    assert done.returncode == 0, done.stderr
    for size in (0, -1):
        done = call("test", "--model_path", run, f"--batch_size={size}", cwd=tmp_path)
        refused(done, f"batch_size is {size}")
    refused(call("inspect", run, "--images=-3", cwd=tmp_path), "images is -3")


def limited_to(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


def test_r16_memory(pics: Path, tmp_path: Path) -> None:
    done = call("train", "--preset", "reference", "--dataset", "shapes", "--image_size", 128,
                "--embed_dim", 512, "--n_attention_heads", 8, "--batch_size", 2000,
                "--num_train_images", 2000, "--epochs", 1, cwd=tmp_path,
                preexec_fn=limited_to(6_000_000_000))  # fmt: skip
    refused(done, "batch_size", 1)
    done = train(tmp_path, "r16", "--dataset", "folder", "--data_path", pics, "--image_size", 1024,
                 "--patch_size", 16, preexec_fn=limited_to(2_500_000_000))  # fmt: skip
    refused(done, "memory", done.returncode)  # the data do not fit, or a batch beside them


def test_r17_files_of_settings(run: Path, tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_bytes(b"\xef\xbb\xbfepochs = 1\nnum_train_images = 100\n")
    done = train(tmp_path, "r17", "--config", "b.toml")
    assert done.returncode == 0, done.stderr
    done = train(tmp_path, "r17b", "--config", "output/r17/config.json")
    assert done.returncode == 0, done.stderr
    config = tmp_path / "output/r17/config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert call("train", "--resume", "output/r17", cwd=tmp_path).returncode == 0


def test_r18_an_incompatible_torchvision(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "torchvision").mkdir(parents=True)
    (broken / "torchvision-0.28.0.dist-info").mkdir()
    (broken / "torchvision/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    (broken / "torchvision-0.28.0.dist-info/METADATA").write_text(metadata)
    path = os.pathsep.join(filter(None, (str(broken), os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": path}
    done = call("test", "--model_path", run, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    done = train(tmp_path, "r18", "--num_train_images", 100, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output/r18/result.json").is_file()


def test_r19_unwritable_folders(run: Path, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    picture = next(Path(json.loads((run / "manifest.json").read_text())["root"]).glob("*/*.png"))
    done = call("explain", picture, "--model_path", run, "--output_path",
                "out/" + "x" * 500 + ".gif", cwd=tmp_path)  # fmt: skip
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) <= 3
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "vitrail", "predict", "--csv", picture, "--model_path", run],
                stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert "Traceback" not in done.stderr
        assert "No space left" in done.stderr
        assert done.returncode == 1


def test_csv_with_non_latin_names_is_complete(pics: Path, run: Path, tmp_path: Path) -> None:
    shutil.copy(pics / "star/0001.png", tmp_path / "猫.png")
    done = call("predict", "猫.png", "--csv", "--model_path", run, cwd=tmp_path)
    rows = list(csv.reader(io.StringIO(done.stdout)))
    assert rows[0] == ["picture", "rank", "class", "probability"]
    assert len(rows) == 4
