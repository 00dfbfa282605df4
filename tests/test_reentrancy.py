"""Public functions leave the process as they found it, also when they raise; threads; fork.

Every scenario below calls public functions on a tiny model. While one runs, every public function
in it is watched: the state of the process when it returns is held against the state when it was
called. Then an exception is thrown inside of each in turn.
"""

import copy
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
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
from vitrail.evaluation import metrics, plots, tables
from vitrail.explain import explanation, inspection, inspection_plot, notebook, page, score, text
from vitrail.explain.attention_snapshots import draw_attention
from vitrail.explain.map_report import plot_scores, score_table
from vitrail.explain.methods import METHODS, MapSettings, compute_maps
from vitrail.explain.sheet import Look
from vitrail.inference.classifier import Classifier
from vitrail.model import VisionTransformer
from vitrail.runtime import rng
from vitrail.training.run import Run
from vitrail.weights.checkpoint import CheckpointInfo, save_checkpoint, save_weights_file
from vitrail.weights.pretrained import (
    default_model,
    load,
    read,
    remodel,
    save,
    start_from,
    with_data,
    with_init,
)

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from hostile_weights import reference_state

MODULES = ("vitrail.inference.classifier", "vitrail.weights.pretrained", "vitrail.training.run")
PACKAGES = ("vitrail.explain", "vitrail.evaluation")
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


def public_members() -> dict[str, tuple[Any, str, Any]]:
    """Return every public function and method by name: its owner, its name there, and itself."""
    found: dict[str, tuple[Any, str, Any]] = {}
    names = list(MODULES)
    for package in PACKAGES:
        folder = importlib.import_module(package).__path__
        names += [f"{package}.{module.name}" for module in pkgutil.iter_modules(folder)]
    for name in names:
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            if not key.startswith("_") and getattr(value, "__module__", "") == name:
                found |= members_of(module, key, value)
    for name in vitrail.__all__:
        value = getattr(vitrail, name)
        found |= members_of(importlib.import_module(value.__module__), name, value)
    return found


def members_of(owner: Any, key: str, value: Any) -> dict[str, tuple[Any, str, Any]]:
    """Return a function, or a class's public methods that are written in its own file."""
    name = f"{owner.__name__}.{key}" if inspect.ismodule(owner) else f"{owner.__qualname__}.{key}"
    if not inspect.isclass(value):
        return {name: (owner, key, value)} if function_of(value) else {}
    return {
        f"{value.__module__}.{value.__name__}.{inner}": (value, inner, member)
        for inner, member in vars(value).items()
        if not inner.startswith("_")
        and function_of(member)
        and function_of(member).__code__.co_filename == inspect.getfile(value)  # type: ignore[union-attr]
    }


def function_of(value: Any) -> FunctionType | None:
    """Return the function inside of a method, a property or what decorates a function."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if inspect.isfunction(value) else None


PUBLIC = public_members()


# Watching.


class Watch:
    """Stands before every public function and compares the state at its call and its return.

    A generator counts each time that it goes on, so that nothing may be yielded inside of a block
    that changes the state.
    """

    def __init__(self) -> None:
        self.calls = dict.fromkeys(PUBLIC, 0)
        self.broken: list[str] = []

    @contextmanager
    def compare(self, name: str) -> Iterator[None]:
        """Note what the block changes, the first times that it is run for this name."""
        self.calls[name] += 1
        before = state() if self.calls[name] <= 3 else None
        try:
            yield
        finally:
            changed = differences(before, state()) if before else []
            self.broken += [f"{name} changes {what}" for what in changed]

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does as ``function``, watched."""

        def whole(*arguments: Any, **settings: Any) -> Any:
            with self.compare(name):
                return function(*arguments, **settings)

        def steps(*arguments: Any, **settings: Any) -> Iterator[Any]:
            with self.compare(name):
                going = function(*arguments, **settings)
            try:
                while True:
                    with self.compare(name):
                        try:
                            item = next(going)
                        except StopIteration:
                            return
                    yield item
            finally:
                going.close()

        return steps if inspect.isgeneratorfunction(function) else whole

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Put the watched functions into every place that names the public ones."""
        with pytest.MonkeyPatch.context() as patch:
            modules = [m for n, m in sys.modules.items() if n.startswith("vitrail")]
            places = [vars(m) for m in [*modules, sys.modules[__name__]]]
            places += [v for place in places for v in place.values() if type(v) is dict]
            for name, (owner, key, value) in PUBLIC.items():
                if inspect.isclass(owner):
                    patch.setattr(owner, key, self.wrap_member(name, value))
                else:
                    watched = self.wrap(name, value)
                    for place in places:
                        for other in [k for k, v in place.items() if v is value]:
                            patch.setitem(place, other, watched)
            yield

    def wrap_member(self, name: str, member: Any) -> Any:
        """Return a method, class method or property, watched."""
        if isinstance(member, property):
            return property(self.wrap(name, member.fget))  # type: ignore[arg-type]
        if isinstance(member, classmethod | staticmethod):
            return type(member)(self.wrap(name, member.__func__))
        return self.wrap(name, member)


class InjectedError(BaseException):
    """Raised inside of a function; no ``except`` holds it."""


class Profile:
    """Counts the calls that each function of some makes, or raises in the place of one of them.

    The end of a ``with`` is left out: whoever stops that from running leaves the state changed,
    and nobody can help it.
    """

    def __init__(self, functions: Iterable[FunctionType], raise_at: int = 0) -> None:
        self.counts = {function.__code__: 0 for function in functions}
        self.raise_at = raise_at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name != "__exit__" and frame.f_back is not None:
            code = frame.f_back.f_code
        elif event == "c_call" and getattr(argument, "__name__", "") != "__exit__":
            code = frame.f_code
        else:
            return
        if code in self.counts:
            self.counts[code] += 1
            if self.counts[code] == self.raise_at:
                raise InjectedError


def profiled(profile: Profile, scenario: Callable[["World"], None], world: "World") -> None:
    """Run a scenario; what the profile raises ends it."""
    sys.setprofile(profile)
    try:
        scenario(world)
    except InjectedError:
        pass
    finally:
        sys.setprofile(None)


def throw_into(
    functions: dict[str, FunctionType],
    scenario: Callable[["World"], None],
    world: "World",
    *,
    places: Sequence[int] = (1, 2),
) -> list[str]:
    """Throw into each function at its last call of another, or after a half (2) of them."""
    count, broken = Profile(functions.values()), []
    profiled(count, scenario, world)
    for name, function in functions.items():
        calls = count.counts[function.__code__]
        for number in sorted({calls // part for part in places} - {0}):
            before = whole_state()
            profiled(Profile([function], raise_at=number), scenario, world)
            world.model.eval()
            broken += [f"{name} leaves {n} changed" for n in differences(before, whole_state())]
    return broken


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
    default_model(world.folder)
    with_data(world.classifier, fit="pad")


def converting(world: World) -> None:
    file = world.folder / "x.safetensors"
    found = read(file)
    settings = with_init(CONFIG, str(file)).training
    start_from(copy.deepcopy(world.model), settings, world.classifier.classes)
    remodel(found, replace(found.info.config.model, n_classes=3), new_head=True)
    save(found, world.folder / "again.safetensors")


def predicting(world: World) -> None:
    file = io.BytesIO()
    Image.fromarray(world.picture).save(file, "PNG")
    world.classifier.predict([world.picture, file.getvalue()], top_k=2)
    world.classifier.prepare(world.picture)
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
    world.explained(method="all")


def drawing_a_sheet(world: World) -> None:
    text.known_characters()
    world.explained(frames="heads", query=(0, 1)).save(world.folder / "sheet.png")


def drawing_an_animation(world: World) -> None:
    world.explained().save(world.folder / "x.gif")
    notebook.to_html(world.explained())
    notebook.to_png(world.explained())


def drawing_the_reference_frames(world: World) -> None:
    found = world.explained(layers=(1,), method="rollout")
    found.save(world.folder / "reference.png", style="reference")
    found.save(world.folder / "reference.webp", style="reference")


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
    inspection.inspect_model(world.model, world.images_BCHW).to_json()
    inspection.attention_distance(world.model, world.images_BCHW)
    inspection.attention_entropy(world.model, world.images_BCHW)


def drawing_insides(world: World) -> None:
    found = inspection.inspect_model(world.model, world.images_BCHW)
    inspection_plot.draw_insides(found, world.folder / "insides.png")


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
    tables.metrics_table(found), tables.confusion_table(found)


def plotting_figures(world: World) -> None:
    found = measured(world)
    plots.plot_calibration(found, world.folder / "calibration.png")
    plots.plot_confusion(found, world.folder / "confusion.png")
    plots.plot_run([{"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5}], None, world.folder)


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
    two = next(iter(again.monitored.values())).take(torch.arange(2))
    draw_attention(again.state.model, two, config, folder / "a.png")


def asking_for_settings(world: World) -> None:
    vitrail.get_preset("quick").flat()
    _ = MODEL.image_hw, MODEL.grid_GJ, MODEL.hidden_dim, MODEL.stem_widths
    world.model.forward(world.images_BCHW)
    world.model.forward_with_attention(world.images_BCHW)


SCENARIOS: tuple[Callable[[World], None], ...] = (
    loading, converting, predicting, explaining, explaining_in_other_ways, drawing_a_sheet,
    drawing_an_animation, drawing_the_reference_frames, writing_a_page, scoring, plotting_scores,
    inspecting, drawing_insides, measuring, plotting_figures, running, asking_for_settings,
)  # fmt: skip


@pytest.fixture(scope="module")
def seen(world: World) -> dict[str, Watch]:
    """Every scenario, run under watch; figures are made, but not drawn, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: None)
        return watch_all(world)


def watch_all(world: World) -> dict[str, Watch]:
    """Run every scenario under watch; what is loaded on first use is loaded before.

    torch itself adds filters of warnings and a setting to the environment when its compiler is
    loaded, which the first optimizer does.
    """
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch._inductor.runtime.cache_dir_utils").cache_dir()
    found = {}
    for scenario in SCENARIOS:
        watch, before = Watch(), whole_state()
        with watch.everywhere():
            scenario(world)
        changed = differences(before, whole_state())
        watch.broken += [f"{scenario.__name__} changes {what}" for what in changed]
        found[scenario.__name__] = watch
    return found


def test_no_public_function_leaves_the_process_changed(
    seen: dict[str, Watch], world: World
) -> None:
    assert {name: watch.broken for name, watch in seen.items() if watch.broken} == {}
    assert not any(module.training for module in world.model.modules())
    assert all(p.requires_grad and p.grad is None for p in world.model.parameters())


def called(scenario: Callable[[World], None], seen: dict[str, Watch]) -> dict[str, FunctionType]:
    """Return the public functions that a scenario is the first to call."""
    found: dict[str, FunctionType] = {}
    for name, (_, _, value) in PUBLIC.items():
        first = next((n for n, watch in seen.items() if watch.calls[name]), "")
        function = function_of(value)
        if first == scenario.__name__ and function is not None:
            found[name] = function
    return found


def with_blocks(functions: dict[str, FunctionType]) -> dict[str, FunctionType]:
    """Return those that have a ``with``: only these change the state for a while."""
    return {n: f for n, f in functions.items() if "  with " in inspect.getsource(f)}


CHEAP = (loading, predicting, explaining, measuring)


@pytest.mark.parametrize("scenario", CHEAP, ids=lambda each: each.__name__)
def test_nor_does_one_that_raised_inside_a_block(
    scenario: Callable[[World], None], seen: dict[str, Watch], world: World
) -> None:
    functions = with_blocks(called(scenario, seen))
    assert throw_into(functions, scenario, world, places=[1]) == []


@pytest.mark.slow
def test_no_public_function_that_draws_leaves_the_process_changed(world: World) -> None:
    watches = watch_all(world)
    assert {name: watch.broken for name, watch in watches.items() if watch.broken} == {}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.__name__)
def test_nor_does_any_that_raised(
    scenario: Callable[[World], None], seen: dict[str, Watch], world: World
) -> None:
    assert throw_into(called(scenario, seen), scenario, world) == []


def leaves_changed(world: World) -> None:
    """Draw a number, and turn gradients off while ``compute_maps`` works, without a block."""
    torch.rand(1)
    torch.set_grad_enabled(False)
    compute_maps(world.model, world.images_BCHW, MapSettings())
    torch.set_grad_enabled(True)


def test_the_watch_sees_what_is_left_changed(world: World) -> None:
    watch = Watch()
    watch.calls["leaves_changed"] = 0
    with torch.random.fork_rng():
        watch.wrap("leaves_changed", leaves_changed)(world)
        assert watch.broken == ["leaves_changed changes torch's generator"]
        try:
            broken = throw_into({"compute_maps": compute_maps}, leaves_changed, world)
        finally:
            torch.set_grad_enabled(True)
    assert "compute_maps leaves grad mode changed" in broken


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
        (DataError, lambda w: inspection.inspect_model(w.model, w.images_BCHW[:3])),
        (CheckpointError, lambda w: metrics.quick_scores(torch.full((2, 3), torch.nan),
                                                         torch.zeros(2, dtype=torch.int64))),
        (ConfigError, lambda w: vitrail.get_preset("none")),
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
    for method in ("rollout", "relevance", "gradcam"):
        found.append(world.explained(method=method).maps_FGJ.tolist())
    drawn = world.explained(method="rollout").save(world.folder / f"{number}.png")
    found.append(drawn.read_bytes())
    return [*found, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]


def test_many_threads_load_predict_and_explain(world: World) -> None:
    expected, before = everything(world, 0), whole_state()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: everything(world, number), range(7)))
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
from vitrail.weights.pretrained import load
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
