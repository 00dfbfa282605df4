"""Public functions do not change global state, even if they raise; threads; fork."""

import io
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

import vitrail
from vitrail.config.settings import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from vitrail.data.images import ImageSet
from vitrail.data.pictures import read_picture
from vitrail.errors import CheckpointError, ConfigError, DataError, PictureError
from vitrail.evaluation import metrics
from vitrail.explain import inspection, map_metrics
from vitrail.explain.map_settings import METHODS, VIEWS
from vitrail.inference.classifier import Classifier
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng
from vitrail.training.run import Run
from vitrail.weights.checkpoint import CheckpointInfo, save_checkpoint, save_weights_file
from vitrail.weights.pretrained import load

MODEL = ModelConfig(
    image_size=(12, 20), n_classes=3, patch_size=4, embed_dim=8, n_layers=2, n_attention_heads=2,
    forward_mul=1.5,
)  # fmt: skip
CONFIG = Config(
    model=replace(MODEL, n_classes=0, image_size=8, n_layers=1),
    data=DataConfig(num_train_images=14, num_test_images=12, validation_images=11),
    augment=AugmentConfig(randaugment_ops=1),
    training=TrainingConfig(epochs=1, batch_size=7, warmup_epochs=0.0, ema_decay=0.5),
    run=RunConfig(keep_checkpoints=1),
)


def state() -> dict[str, object]:
    """Return everything global that a library could leave changed."""
    numpy_state = np.random.get_state(legacy=True)
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matrix products": torch.get_float32_matmul_precision(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "NumPy's generator": (numpy_state[1].tobytes(), *numpy_state[2:]),  # type: ignore[union-attr]
        "Python's generator": random.getstate(),
        "NumPy's errors": np.geterr(),
        "warning filters": tuple(warnings.filters),
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "folder": Path.cwd(),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "streams": (sys.stdin, sys.stdout, sys.stderr, sys.displayhook, sys.excepthook),
        "environment": dict(os.environ),
    }


def differences(before: dict[str, object]) -> list[str]:
    after = state()
    return [name for name in before if before[name] != after[name]]


@dataclass(frozen=True)
class World:
    """A tiny model, saved in two formats, and inputs for it."""

    folder: Path
    model: VisionTransformer
    images_BCHW: Tensor
    picture: np.ndarray
    classifier: Classifier

    @property
    def image_set(self) -> ImageSet:
        raw_BCHW = (self.images_BCHW * 50 + 128).clamp(0, 255).byte()
        return ImageSet(raw_BCHW, torch.arange(12) % 3, ("a", "b", "c"))

    def logits(self, precision: str = "bfloat16") -> Tensor:
        return metrics.predict_logits(
            self.model, self.image_set, mean=(0.5,) * 3, std=(0.5,) * 3,
            device=torch.device("cpu"), precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    import torch._dynamo  # adds warning filters when it is first imported, as an optimizer does
    import torch._inductor.runtime.cache_dir_utils as cache

    cache.cache_dir()  # sets an environment variable
    folder = tmp_path_factory.mktemp("world")
    with rng.seeded(3, "init", device=torch.device("cpu")):
        model = VisionTransformer(MODEL).eval()
        images_BCHW = torch.randn(12, 3, 12, 20)
    info = CheckpointInfo(Config(model=MODEL), ("a", "b", "c"), {"step": 3}, {})
    checkpoints = folder / "run" / "checkpoints"
    save_checkpoint(checkpoints / "step-0000003", info, weights=model.state_dict(), training={})
    (checkpoints / "BEST").write_text("step-0000003\n")
    save_weights_file(folder / "x.safetensors", info, model.state_dict())
    picture = np.random.default_rng(1).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    return World(folder, model, images_BCHW, picture, load(folder / "run", device="cpu"))


# Nothing global changes.


def loads(world: World) -> None:
    for name in ("run", "x.safetensors"):
        load(world.folder / name, device="cpu")


def predicts(world: World) -> None:
    world.classifier.predict([world.picture], top_k=2)
    world.classifier.prepare(world.picture)


def explains(world: World) -> None:
    for method in (*METHODS, *VIEWS):
        world.classifier.explain(world.picture, method=method)
    world.classifier.explain(world.picture, method="relevance", class_name="b")


def draws(world: World) -> None:
    explanation = world.classifier.explain(world.picture)
    for name in ("x.gif", "x.png", "x.html"):
        explanation.save(world.folder / name)


def evaluates(world: World) -> None:
    metrics.measure(world.logits(), world.image_set.labels_B, classes=("a", "b", "c"))


def scores(world: World) -> None:
    masks_BHW = world.images_BCHW[:, 0] > 0.5
    map_metrics.score_methods(
        world.model, world.images_BCHW, masks_BHW, ("attention",),
        steps=2,
    )  # fmt: skip


def inspects(world: World) -> None:
    inspection.inspect_model(world.model, world.images_BCHW)


def training(world: World) -> None:
    number = len(list(world.folder.glob("training-*")))
    folder = world.folder / f"training-{number}"
    folder.mkdir()
    config = replace(CONFIG, run=replace(CONFIG.run, model_path=world.folder / "weights"))
    run = Run.start(config, folder)
    updates = run.train()
    before = state()
    next(updates)
    assert differences(before) == [], "between two updates"
    run.save()
    updates.close()
    again = Run.resume(folder, config)
    list(again.train())
    again.finish()


@pytest.mark.parametrize(
    "work", [loads, predicts, explains, draws, evaluates, scores, inspects, training]
)
def test_the_process_is_left_unchanged(work: Callable[[World], None], world: World) -> None:
    before = state()
    work(world)
    assert differences(before) == []
    assert not any(module.training for module in world.model.modules())
    assert all(p.requires_grad and p.grad is None for p in world.model.parameters())


@pytest.mark.parametrize("work", [predicts, explains, evaluates, scores, inspects, training])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_in_the_middle_leaves_the_process_unchanged(
    work: Callable[[World], None], call: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in the first or second attention, inside every context manager around the model."""
    from vitrail.model.vit import Attention

    forward, calls = Attention.forward, 0

    def fail(self: Attention, *arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(Attention, "forward", fail)
    before = state()
    with pytest.raises(KeyboardInterrupt):
        work(world)
    assert differences(before) == []


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (CheckpointError, lambda w: load(w.folder / "none", device="cpu")),
        (PictureError, lambda w: w.classifier.predict(b"no picture")),
        (ConfigError, lambda w: w.classifier.predict(w.picture, top_k=0)),
        (ConfigError, lambda w: w.classifier.explain(w.picture, layers=(99,))),
        (DataError, lambda w: map_metrics.score_methods(w.model, w.images_BCHW[:3], None)),
        (DataError, lambda w: inspection.inspect_model(w.model, w.images_BCHW[:3])),
        (CheckpointError, lambda w: metrics.quick_scores(torch.full((2, 3), torch.nan),
                                                         torch.zeros(2, dtype=torch.int64))),
        (ConfigError, lambda w: vitrail.get_preset("none")),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_process_unchanged(
    error: type[Exception], call: Callable[[World], object], world: World
) -> None:
    before = state()
    with pytest.raises(error):
        call(world)
    assert differences(before) == []


def test_a_new_model_draws_only_from_torch() -> None:
    before = state()
    with torch.random.fork_rng():
        VisionTransformer(MODEL)
        assert differences(before) == ["torch's generator"]


# Threads and fork.


def everything(world: World, number: int) -> list[Any]:
    """Load, predict and explain; return what can be compared."""
    classifier = load(world.folder / ("run", "x.safetensors")[number % 2], device="cpu")
    file = io.BytesIO()
    Image.fromarray(world.picture).convert("P").save(file, "GIF")
    found = [classifier.predict([world.picture, read_picture(file.getvalue())])]
    for method in ("rollout", "relevance", "gradcam"):
        found.append(world.classifier.explain(world.picture, method=method).maps_FGJ.tolist())
    drawn = world.classifier.explain(world.picture, method="rollout")
    found.append(drawn.save(world.folder / f"{number}.png").read_bytes())
    return [*found, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]


def test_many_threads_load_predict_and_explain(world: World) -> None:
    expected, before = everything(world, 0), state()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: everything(world, number), range(7)))
    assert differences(before) == []
    assert all(each == expected for each in found)
    assert not world.model.training


@pytest.fixture
def no_fork_warning() -> Iterator[None]:
    """From 3.12 on Python warns of a fork while threads run, which is what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        yield


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.usefixtures("no_fork_warning")
def test_everything_works_after_fork(world: World) -> None:
    expected = everything(world, 0)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(everything(world, 1) == expected))
    child.start()
    try:
        assert receiver.poll(100), "the child hangs"
        assert receiver.recv()
    finally:
        child.kill()
        child.join()
