"""Fixtures shared by several test files.

PyTorch is imported by those who use it: the process that hands out the tests needs none.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from filelock import FileLock

from vitrail.config.files import from_json
from vitrail.config.settings import Config, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from vitrail.data.images import ImageSet
    from vitrail.model.vit import VisionTransformer


SLOWEST = (
    "test_explanation", "test_tutorial", "test_documents", "test_faults", "test_cli",
    "test_page_browser", "test_methods", "test_reference_commands", "test_run",
    "test_limited_device", "test_draw", "test_views", "test_plots", "test_process", "test_ranks",
    "test_serve", "test_bench",
)  # fmt: skip
"""The files that take longest; one that is missing here costs time only."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files, so that no worker is left with one at the end."""
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOWEST)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors are faster on one thread, and sums are then the same everywhere."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cached_shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Generate the shapes once for all tests and workers: they are always the same bytes."""
    import torch

    from vitrail.data.shapes import load_shapes

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers

    @functools.cache
    def load(which: Literal["train", "test"]) -> ImageSet:
        path = folder / f"shapes-{which}.pt"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                torch.save(load_shapes(which), path)
        images: ImageSet = torch.load(path, weights_only=False)
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.data.datasets.load_shapes", load)
        yield


@pytest.fixture(scope="module")
def rough_plots() -> Iterator[None]:
    """For tests of something else: plots are drawn once, with few dots and unfitted margins.

    Else plots are most of the time of a short training. Sheets of maps are drawn as ever.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    save = Figure.savefig

    def save_roughly(figure: Figure, file: Any, **settings: Any) -> None:
        if "bbox_inches" not in settings:
            return save(figure, file, **settings)
        figure.set_layout_engine("none")
        figure.set_dpi(40)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).save(file, settings["format"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_roughly)
        yield


@pytest.fixture
def small_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of something else: pictures are drawn with a third of their height and width."""
    monkeypatch.setattr("vitrail.explain.panels.SMALLEST_SIDE", 128)


@pytest.fixture
def tiny_model() -> ModelConfig:
    """A model whose sizes are all different and not square."""
    return ModelConfig(
        image_size=(20, 28),
        n_classes=7,
        patch_size=4,
        embed_dim=24,
        n_layers=2,
        n_attention_heads=3,
        forward_mul=1.5,
    )


@pytest.fixture
def make_model(tiny_model: ModelConfig) -> Callable[..., VisionTransformer]:
    """A model of 5 x 7 patches and 3 blocks whose attention is far from uniform."""
    import torch

    from vitrail.model.vit import VisionTransformer

    def make(pool: str = "cls", **changes: Any) -> VisionTransformer:
        config = dataclasses.replace(tiny_model, pool=pool, n_layers=3, **changes)
        torch.manual_seed(4)
        model = VisionTransformer(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)
        return model

    return make


@pytest.fixture
def images_BCHW() -> Tensor:
    """Five inputs of ``make_model``."""
    import torch

    return torch.randn(5, 3, 20, 28, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="session")
def tiny_run() -> Config:
    """A run on generated shapes that takes a second."""
    return from_json(
        {
            "model": {
                "image_size": 32,
                "patch_size": 8,
                "embed_dim": 12,
                "n_layers": 1,
                "n_attention_heads": 3,
            },
            "data": {"dataset": "shapes", "num_train_images": 90, "num_test_images": 70},
            "augment": {"randaugment_ops": 1},
            "training": {"batch_size": 40, "epochs": 3, "warmup_epochs": 0.5, "ema_decay": 0.9},
        }
    )


@pytest.fixture(scope="session")
def vitrail() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own."""

    def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vitrail", *map(str, words)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of weights and outputs of the reference implementation's own code."""
    return Path(__file__).parent / "reference"


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """Noise in CIFAR-10's layout, pickled by Python 3: 60 images to train, 23 to test."""
    import numpy as np

    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(5)
    for name, count in [*((f"data_batch_{n}", 12) for n in range(1, 6)), ("test_batch", 23)]:
        labels = [index % 10 for index in range(count)]
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}))
    return folder
