"""Public functions leave the process as they found it, also when they raise; threads; fork.

Every scenario below calls public functions on a tiny model. While one runs, every public function
in it is watched: the state of the process when it returns or raises is held against the state when
it was called. Then an exception is thrown inside of each in turn.
"""

import importlib
import inspect
import io
import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

import vitrine
from vitrine import rng
from vitrine.checkpoint import CheckpointInfo, save_checkpoint, save_weights_file
from vitrine.config import AugmentConfig, Config, DataConfig, ModelConfig, RunConfig, TrainingConfig
from vitrine.data.images import ImageSet
from vitrine.data.pictures import read_picture
from vitrine.errors import CheckpointError, ConfigError, DataError, PictureError
from vitrine.evaluation import figures, metrics, report
from vitrine.explain import explanation, insides, insides_figure, lettering, page, score
from vitrine.explain.drawing import Look
from vitrine.explain.methods import METHODS, MapSettings, compute_maps
from vitrine.explain.score_report import plot_scores, score_table
from vitrine.model import VisionTransformer
from vitrine.predict import Classifier
from vitrine.pretrained import load, newest_run, with_data
from vitrine.run import Run

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from hostile_weights import reference_state

MODULES = ("vitrine.predict", "vitrine.pretrained", "vitrine.run")
PACKAGES = ("vitrine.explain", "vitrine.evaluation")
MODEL = ModelConfig(
    image_size=(12, 20), n_classes=3, patch_size=4, embed_dim=8, n_layers=2, n_attention_heads=2,
    forward_mul=1.5,
)  # fmt: skip
CONFIG = Config(
    model=replace(MODEL, n_classes=0, image_size=8, n_layers=1, dropout=0.0),
    data=DataConfig(num_train_images=14, num_test_images=12, validation_images=11),
    augment=AugmentConfig(randaugment_ops=1),
    training=TrainingConfig(epochs=1, batch_size=7, warmup_epochs=0.0, ema_decay=0.5),
    run=RunConfig(keep_checkpoints=1),
)


# The state of the process.


def state() -> dict[str, object]:
    """Return everything global that a library could leave changed, and that is cheap to ask."""
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
        "anomalies": torch.is_anomaly_enabled(),
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "NumPy's generator": (numpy_state[1].tobytes(), *numpy_state[2:]),  # type: ignore[union-attr]
        "Python's generator": random.getstate(),
        "NumPy's errors": np.geterr(),
        "filters of warnings": tuple(warnings.filters),
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "folder": Path.cwd(),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
    }


def whole_state() -> dict[str, object]:
    """Return what costs more, too."""
    settings = {name: str(value) for name, value in dict.items(matplotlib.rcParams)}
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.displayhook, sys.excepthook)
    return {**state(), "matplotlib": settings, "environment": dict(os.environ), "streams": streams}


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


# What is public.


def public_functions() -> dict[CodeType, str]:
    """Return the code of every public function and method, with its name."""
    found: dict[CodeType, str] = {}
    names = list(MODULES)
    for package in PACKAGES:
        folder = importlib.import_module(package).__path__
        names += [f"{package}.{module.name}" for module in pkgutil.iter_modules(folder)]
    for name in names:
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            if not key.startswith("_") and getattr(value, "__module__", "") == name:
                found |= codes_of(value, f"{name}.{key}")
    for name in vitrine.__all__:
        found |= codes_of(getattr(vitrine, name), f"vitrine.{name}")
    return found


def codes_of(value: Any, name: str) -> dict[CodeType, str]:
    """Return the code of a function, or of a class's public methods."""
    if inspect.isclass(value):
        own = inspect.getfile(value)
        members = {f"{name}.{key}": m for key, m in vars(value).items() if not key.startswith("_")}
        inner = [codes_of(member, key) for key, member in members.items()]
        both = {code: key for codes in inner for code, key in codes.items()}
        return {code: key for code, key in both.items() if code.co_filename == own}
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(getattr(value, "__func__", value))
    return {value.__code__: name} if inspect.isfunction(value) else {}


PUBLIC = public_functions()


# Watching.


class Watcher:
    """Compares the state at a public function's call and its return, the first times it is called.

    A generator counts each time that it goes on, so that nothing may be yielded inside of a block
    that changes the state.
    """

    def __init__(self) -> None:
        self.calls: dict[CodeType, int] = dict.fromkeys(PUBLIC, 0)
        self.inner: dict[CodeType, int] = dict.fromkeys(PUBLIC, 0)
        self.open: dict[int, dict[str, object]] = {}
        self.broken: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        caller = calling(frame, event, argument)
        if caller in self.inner:
            self.inner[caller] += 1
        if frame.f_code not in PUBLIC:
            return
        if event == "call":
            self.calls[frame.f_code] += 1
            if self.calls[frame.f_code] <= 3:
                self.open[id(frame)] = state()
        elif event == "return" and id(frame) in self.open:
            changed = differences(self.open.pop(id(frame)), state())
            self.broken += [f"{PUBLIC[frame.f_code]} changes {name}" for name in changed]


def calling(frame: FrameType, event: str, argument: Any) -> CodeType | None:
    """Return the code that makes a call, leaving out the end of a ``with``.

    Whoever stops that from running leaves the state changed, and nobody can help it.
    """
    if event == "call" and frame.f_code.co_name != "__exit__" and frame.f_back is not None:
        return frame.f_back.f_code
    if event == "c_call" and getattr(argument, "__name__", "") != "__exit__":
        return frame.f_code
    return None


class InjectedError(BaseException):
    """Raised inside of a function; no ``except`` holds it."""


class Injector:
    """Raises in the place of the nth call that a function makes."""

    def __init__(self, code: CodeType, number: int) -> None:
        self.code, self.left = code, number

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if calling(frame, event, argument) is self.code:
            self.left -= 1
            if self.left == 0:
                raise InjectedError


# What is called.


@dataclass(frozen=True)
class World:
    """A tiny model and all that it may be asked about."""

    folder: Path
    model: VisionTransformer
    images_BCHW: Tensor
    masks_BHW: Tensor
    picture: np.ndarray
    classifier: Classifier

    def explained(self, **settings: Any) -> explanation.Explanation:
        return self.classifier.explain(self.picture, **settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    with rng.seeded(3, "init", device=torch.device("cpu")):
        model = VisionTransformer(MODEL).eval()
        images_BCHW = torch.randn(12, 3, 12, 20)
        masks_BHW = torch.rand(12, 12, 20) > 0.5
    info = CheckpointInfo(Config(model=MODEL), ("a", "b", "c"), {"step": 3}, {})
    checkpoints = folder / "run" / "checkpoints"
    save_checkpoint(checkpoints / "step-0000003", info, weights=model.state_dict(), training={})
    (checkpoints / "BEST").write_text("step-0000003\n")
    save_weights_file(folder / "x.safetensors", info, model.state_dict())
    torch.save(reference_state(), folder / "x.pt")
    picture = np.random.default_rng(1).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    classifier = load(folder / "run", device="cpu")
    return World(folder, model, images_BCHW, masks_BHW, picture, classifier)


def loading(world: World) -> None:
    for name in ("run", "x.safetensors", "x.pt"):
        load(world.folder / name, device="cpu")
    newest_run(world.folder)
    with_data(world.classifier, fit="pad")


def predicting(world: World) -> None:
    file = io.BytesIO()
    Image.fromarray(world.picture).save(file, "PNG")
    world.classifier.predict([world.picture, file.getvalue()], top_k=2)
    _ = world.classifier.device, world.classifier.mean, world.classifier.std


def explaining(world: World) -> None:
    for method in METHODS:
        world.explained(method=method)
    world.explained(method="rollout", fusion="max", discard_ratio=0.5, query=(1, 2))
    world.explained(method="relevance", class_name="b")


def explaining_in_other_ways(world: World) -> None:
    world.explained(frames="heads")
    _ = world.explained(frames="queries").maps_FGJ, world.explained(frames="layers").titles
    subject = world.classifier.subject(world.picture)
    settings = MapSettings(method="rollout")
    explanation.explain(subject, settings, kind="training",
                        checkpoints=[("one", world.model), ("two", world.model)])  # fmt: skip
    explanation.compare(subject, [settings, MapSettings(method="gradcam")])


def drawing_a_sheet(world: World) -> None:
    lettering.known_characters.cache_clear()
    world.explained(frames="heads", query=(0, 1)).save(world.folder / "sheet.png")


def drawing_an_animation(world: World) -> None:
    world.explained().save(world.folder / "x.gif")


def drawing_the_reference_frames(world: World) -> None:
    found = world.explained(layers=(1,), method="rollout")
    found.save(world.folder / "seed.png", style="seed")
    found.save(world.folder / "seed.webp", style="seed")


def writing_a_page(world: World) -> None:
    world.explained().save(world.folder / "x.html")
    page.as_jpeg(Image.fromarray(world.picture))


def scoring(world: World) -> None:
    settings = score.ScoreSettings(steps=2)
    scores = score.score_methods(world.model, world.images_BCHW, world.masks_BHW,
                                 ("attention",), settings=settings)  # fmt: skip
    score_table(scores)
    for each in scores:
        each.to_json()


def plotting_scores(world: World) -> None:
    settings = score.ScoreSettings(steps=1)
    scores = score.score_methods(world.model, world.images_BCHW, None, ("rollout",),
                                 settings=settings)  # fmt: skip
    plot_scores(world.folder / "scores.png", scores)


def inspecting(world: World) -> None:
    insides.inspect_model(world.model, world.images_BCHW).to_json()
    insides.attention_distance(world.model, world.images_BCHW)
    insides.attention_entropy(world.model, world.images_BCHW)


def drawing_insides(world: World) -> None:
    found = insides.inspect_model(world.model, world.images_BCHW)
    insides_figure.draw_insides(found, world.folder / "insides.png")


def measured(world: World) -> metrics.Metrics:
    raw_BCHW = (world.images_BCHW * 50 + 128).clamp(0, 255).byte()
    labels_B = torch.arange(12) % 3
    logits_BY = metrics.predict_logits(
        world.model, ImageSet(raw_BCHW, labels_B, ("a", "b", "c")), mean=(0.5,) * 3,
        std=(0.5,) * 3, device=torch.device("cpu"), precision="bfloat16",
    )  # fmt: skip
    metrics.quick_scores(logits_BY, labels_B)
    return metrics.measure(logits_BY, labels_B, classes=("a", "b", "c"))


def measuring(world: World) -> None:
    found = measured(world)
    found.to_json()
    report.metrics_table(found), report.confusion_table(found)


def plotting_figures(world: World) -> None:
    found = measured(world)
    figures.plot_calibration(found, world.folder / "calibration.png")
    figures.plot_confusion(found, world.folder / "confusion.png")
    figures.plot_curves([{"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5}], world.folder)


def running(world: World) -> None:
    number = len(list(world.folder.glob("training-*")))
    folder = world.folder / f"training-{number}"
    folder.mkdir()
    config = replace(CONFIG, run=replace(CONFIG.run, model_path=world.folder / "weights"))
    run = Run.start(config, folder)
    updates = run.train()
    next(updates)
    run.save()
    updates.close()
    again = Run.resume(folder, config)
    list(again.train())
    again.finish()


def asking_for_settings(world: World) -> None:
    vitrine.get_preset("quick").flat()
    _ = MODEL.image_hw, MODEL.grid_GJ, MODEL.hidden_dim
    world.model.forward(world.images_BCHW)
    world.model.forward_with_attention(world.images_BCHW)


SCENARIOS: tuple[Callable[[World], None], ...] = (
    loading, predicting, explaining, explaining_in_other_ways, drawing_a_sheet,
    drawing_an_animation, drawing_the_reference_frames, writing_a_page, scoring, plotting_scores,
    inspecting, drawing_insides, measuring, plotting_figures, running, asking_for_settings,
)  # fmt: skip
QUICK = (loading, predicting, explaining, measuring)
"""Scenarios in which an exception is thrown into every function in the default run, too."""


def watched(scenario: Callable[[World], None], world: World) -> Watcher:
    """Run a scenario under watch."""
    watcher = Watcher()
    sys.setprofile(watcher)
    try:
        scenario(world)
    finally:
        sys.setprofile(None)
    return watcher


@pytest.fixture(scope="module")
def seen(world: World) -> dict[str, Watcher]:
    """Every scenario, run under watch; what is loaded lazily is loaded before."""
    importlib.import_module("torchmetrics.functional.classification")
    found = {}
    for scenario in SCENARIOS:
        before = whole_state()
        found[scenario.__name__] = watched(scenario, world)
        changed = differences(before, whole_state())
        found[scenario.__name__].broken += [f"{scenario.__name__} changes {n}" for n in changed]
    return found


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.__name__)
def test_no_public_function_leaves_the_process_changed(
    scenario: Callable[[World], None], seen: dict[str, Watcher], world: World
) -> None:
    assert seen[scenario.__name__].broken == []
    assert not any(module.training for module in world.model.modules())
    assert all(p.requires_grad and p.grad is None for p in world.model.parameters())


def test_every_public_function_is_in_a_scenario(seen: dict[str, Watcher]) -> None:
    called = {code for watcher in seen.values() for code, n in watcher.calls.items() if n}
    missing = sorted(name for code, name in PUBLIC.items() if code not in called)
    assert missing == [], "no scenario calls these: write one, or add them to one"


def throw_into(scenario: Callable[[World], None], watcher: Watcher, world: World) -> list[str]:
    """Throw into every function that a scenario calls, at its last call and in its middle."""
    broken = []
    for code, name in PUBLIC.items():
        for number in sorted({watcher.inner[code], watcher.inner[code] // 2} - {0}):
            before = whole_state()
            sys.setprofile(Injector(code, number))
            try:
                scenario(world)
            except InjectedError:
                pass
            finally:
                sys.setprofile(None)
                world.model.eval()
            broken += [f"{name} leaves {n} changed" for n in differences(before, whole_state())]
    return broken


@pytest.mark.parametrize(
    "scenario",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in SCENARIOS],
    ids=lambda each: each.__name__,
)
def test_nor_does_one_that_raised(
    scenario: Callable[[World], None], seen: dict[str, Watcher], world: World
) -> None:
    assert throw_into(scenario, seen[scenario.__name__], world) == []


def test_the_watch_sees_what_is_left_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(_: World) -> None:
        torch.rand(1)
        compute_maps(world.model, world.images_BCHW, MapSettings())

    code = compute_maps.__code__
    monkeypatch.setitem(PUBLIC, draws.__code__, "draws")
    assert watched(draws, world).broken == ["draws changes torch's generator"]

    def sets(_: World) -> None:
        torch.set_grad_enabled(False)
        compute_maps(world.model, world.images_BCHW, MapSettings())
        torch.set_grad_enabled(True)

    watcher = watched(sets, world)
    assert watcher.broken == []
    assert watcher.inner[code] > 2
    try:
        assert "leaves grad mode changed" in " ".join(throw_into(sets, watcher, world))
    finally:
        torch.set_grad_enabled(True)


def test_only_a_new_model_draws_and_only_from_torch() -> None:
    before = whole_state()
    with torch.random.fork_rng():
        VisionTransformer(MODEL)
        changed = differences(before, whole_state())
    assert changed == ["torch's generator"]


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (CheckpointError, lambda w: load(w.folder / "none", device="cpu")),
        (PictureError, lambda w: w.classifier.predict(b"no picture")),
        (ConfigError, lambda w: w.classifier.predict(w.picture, top_k=0)),
        (ConfigError, lambda w: w.explained(layers=(99,))),
        (ConfigError, lambda w: w.explained(method="relevance", class_name="dog")),
        (ConfigError, lambda w: w.explained().save("x.bmp")),
        (ConfigError, lambda w: Look(colormap="jet")),
        (DataError, lambda w: score.score_methods(w.model, w.images_BCHW[:3], None)),
        (DataError, lambda w: insides.inspect_model(w.model, w.images_BCHW[:3])),
        (CheckpointError, lambda w: metrics.quick_scores(torch.full((2, 3), torch.nan),
                                                         torch.zeros(2, dtype=torch.int64))),
        (ConfigError, lambda w: vitrine.get_preset("none")),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_process_as_it_was(
    error: type[Exception], call: Callable[[World], object], world: World
) -> None:
    before = whole_state()
    with pytest.raises(error):
        call(world)
    assert differences(before, whole_state()) == []


# Threads and fork.


def everything(world: World, number: int) -> list[Any]:
    """Load, predict and explain; return what can be compared."""
    name = ("run", "x.safetensors")[number % 2]
    classifier = load(world.folder / name, device="cpu")
    file = io.BytesIO()
    Image.fromarray(world.picture).convert("P").save(file, "GIF")
    found = [classifier.predict([world.picture, read_picture(file.getvalue())])]
    for method in METHODS:
        found.append(world.explained(method=method).maps_FGJ.tolist())
    drawn = world.explained(method="rollout").save(world.folder / f"{number}.png")
    found.append(drawn.read_bytes())
    return [*found, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]


def test_many_threads_load_predict_and_explain(world: World) -> None:
    expected, before = everything(world, 0), whole_state()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: everything(world, number), range(12)))
    assert differences(before, whole_state()) == []
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
def test_after_fork_everything_goes_on(world: World) -> None:
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


FORKED = """
import os, sys, torch, numpy as np
from vitrine.pretrained import load
torch.set_num_threads(2)
classifier = load(sys.argv[1], device="cpu")
pictures = [np.full((30, 40, 3), value, np.uint8) for value in range(200)]
before = classifier.predict(pictures)
child = os.fork()
if child == 0:
    same = load(sys.argv[1], device="cpu").predict(pictures) == before
    classifier.explain(pictures[0], method="relevance")
    os._exit(0 if same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_after_fork_with_several_threads(world: World) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(world.folder / "run")]
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, check=False, timeout=600, env=threads)
    assert done.returncode == 0
