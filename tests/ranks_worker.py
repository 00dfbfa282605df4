"""Two ranks of one run, forked from one process; test_ranks.py reads the files they write.

As a script: ``python ranks_worker.py FOLDER PORT``, the port of a store such as torchrun's. Each
rank writes FOLDER/RANK.pt, and its output to FOLDER/RANK.txt.
"""

import dataclasses
import os
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitrail.data.datasets
import vitrail.evaluation.metrics
import vitrail.training.run
from vitrail.cli import main
from vitrail.cli.progress import TrainingDisplay
from vitrail.config.files import from_json
from vitrail.config.settings import Config
from vitrail.data.batches import Batches
from vitrail.data.images import ImageSet
from vitrail.errors import DataError, OutputError, VitrailError
from vitrail.evaluation.metrics import predict_logits
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import distributed, rng
from vitrail.training.loop import Update, train
from vitrail.training.state import TrainingState

BASE = from_json(
    {
        "model": {
            "image_size": [8, 12], "patch_size": 4, "embed_dim": 12, "n_layers": 2,
            "n_attention_heads": 3, "n_classes": 5, "dropout": 0.0,
        },
        "augment": {"crop_padding": 1, "randaugment_ops": 1, "mixup": 0.4},
        "training": {
            "epochs": 3, "batch_size": 3, "warmup_epochs": 1, "precision": "float32",
            "learning_rate": 1e-3, "optimizer": "muon", "ema_decay": 0.7, "accumulate": 2,
            "clip_norm": 0.5,
        },
    }
)  # fmt: skip
"""Ten images in batches of 3, 3, 3 and 1: the second rank's share is smaller, and once empty."""
WORDS = shlex.split(
    "train --device cpu --image_size 32 --patch_size 8 --embed_dim 12 --n_attention_heads 3 "
    "--n_layers 1 --batch_size 11 --validation_images 20 --epochs 2 --dropout 0 --ema_decay 0.9 "
    "--output_path output --precision float32 --stem patch"
)
"""The patch stem, as batch norm in the other one sees the rank's share only."""
MOMENTUM = 0.25


def changed(section: str, **values: Any) -> Config:
    """Return BASE with some settings changed."""
    part = dataclasses.replace(getattr(BASE, section), **values)
    return dataclasses.replace(BASE, **{section: part})


def noise(count: int, size_hw: tuple[int, int], classes: int) -> ImageSet:
    """Return images of noise."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, 3, *size_hw)
    raw_BCHW = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    names = tuple(f"class {index}" for index in range(classes))
    return ImageSet(raw_BCHW, torch.arange(count) % classes, names)


def few_shapes(part: str) -> ImageSet:
    """Replace load_shapes, since generating thousands of images takes a while."""
    return noise({"train": 97, "test": 31}[part], (32, 32), 4)


def make_batches(config: Config, images: ImageSet) -> Batches:
    """Return the batches of a run."""
    return Batches(images, config, device=torch.device("cpu"))


def start(config: Config, *, batch_norm: bool = False) -> TrainingState:
    """Return the state before the first update."""
    torch.manual_seed(2)
    model = VisionTransformer(config.model)
    if batch_norm:
        norm = nn.BatchNorm2d(config.model.embed_dim, momentum=MOMENTUM)
        model.stem = nn.Sequential(model.stem, norm)
    return TrainingState.start(model, config.training)


def learn(config: Config, updates: int = 12, *, batch_norm: bool = False) -> dict[str, Any]:
    """Train, and return the updates, the tensors of the state, and what dropout drew."""
    state, images = start(config, batch_norm=batch_norm), noise(10, (8, 12), 5)
    if config.model.dropout:  # with equal images, only dropout distinguishes their tokens
        images = dataclasses.replace(images, raw_BCHW=images.raw_BCHW[:1].expand(10, -1, -1, -1))
    zeros: list[Tensor] = []
    state.model.dropout.register_forward_hook(lambda *args: zeros.append(args[2][0] == 0))
    done: list[Update] = []
    gradients: list[Tensor] = []
    for update in train(state, make_batches(config, images), config):
        done.append(update)
        gradients = gradients or [weight.grad.clone() for weight in state.model.parameters()]
        if len(done) == updates:
            break
    tensors = {**state.weights(), **state.tensors()}
    return {
        "losses": [u.loss for u in done],
        "correct": [u.correct for u in done],
        "images": [u.images for u in done],
        "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
        "dropped": zeros,
        "gradients": gradients,
    }


def shares() -> list[tuple[Tensor, ...]]:
    """Return this rank's part of every batch of two epochs."""
    batches = make_batches(BASE, noise(10, (8, 12), 5))
    return [tuple(distributed.share(tensor) for tensor in batches(step)) for step in range(8)]


def scores(batch_size: int) -> Tensor:
    """Return the logits of ten images."""
    images, model = noise(10, (8, 12), 5), start(BASE).model
    mean = std = (0.5, 0.5, 0.5)
    return predict_logits(
        model, images, mean=mean, std=std, device=torch.device("cpu"), batch_size=batch_size
    )


def broken_on_one() -> dict[str, Any]:
    """Make a weight of the second rank NaN after the first update."""
    state = start(BASE)
    updates = train(state, make_batches(BASE, noise(10, (8, 12), 5)), BASE)
    next(updates)
    before = {name: t.clone() for name, t in state.model.state_dict().items()}
    if not distributed.is_leader():
        with torch.no_grad():
            state.model.head.fc2.bias[0] = float("nan")
    error = error_of(next, updates)
    same = all(torch.equal(t, before[name]) for name, t in state.model.state_dict().items())
    return {"error": error, "step": state.step, "same": same}


def error_of(function: Any, *args: Any) -> str:
    """Return the type and the message of the error that a function raises."""
    try:
        function(*args)
    except VitrailError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail(error: VitrailError, on: int) -> int:
    """Fail on one rank."""
    if distributed.rank() == on:
        raise error
    return distributed.rank()


def see_file(folder: Path) -> bool:
    """Make a file slowly on the first rank of the machine; return whether it exists."""
    if distributed.local_rank() == 0:
        time.sleep(0.2)
        (folder / "downloaded").write_text("")
    return (folder / "downloaded").exists()


def remembered() -> list[str | None]:
    """Return what torchrun's store holds before and after the leader writes to it."""
    before = distributed.load_value("run folder")
    distributed.gather(0)
    if distributed.is_leader():
        distributed.store_value("run folder", "output/mine")
    distributed.gather(0)
    return [before, distributed.load_value("run folder")]


def copied() -> Tensor:
    """Return the leader's tensor, of odd strides."""
    tensor = (torch.arange(6.0) + 100 * distributed.rank()).view(2, 3).t()
    distributed.copy_from_leader([tensor])
    return tensor


def together(folder: Path) -> dict[str, Any]:
    """Run everything that needs no command line."""
    with distributed.joined():  # inside the one of be_rank
        return {
            "count": distributed.count(),
            "shares": shares(),
            "learned": learn(BASE),
            "plain": learn(changed("training", optimizer="adamw", accumulate=1, clip_norm=0.0)),
            "dropout": learn(changed("model", dropout=0.5), 3),
            "norm": learn(changed("training", batch_size=10, accumulate=1), 1, batch_norm=True),
            "logits": [scores(3), scores(20)],
            "broken": broken_on_one(),
            "each": error_of(distributed.each, fail, DataError("no such file"), 1),
            "leader": error_of(distributed.on_leader, fail, OutputError("disk full"), 0),
            "from leader": distributed.on_leader(fail, DataError("never"), 1),
            "highest": distributed.highest(15 * distributed.rank()),
            "copied": copied(),
            "seen": distributed.first_on_machine(see_file, folder),
            "too small": error_of(distributed.require_work, 1),
            "draws": [
                rng.derive_seed(1, "dropout", distributed.own_index(step)) for step in range(50)
            ],
            "memory": remembered(),
        }


def ask_one_to_stop() -> None:
    """Send the second rank SIGTERM at its fifth event."""
    show, seen = TrainingDisplay.show, []

    def show_and_ask(display: TrainingDisplay, event: Any) -> None:
        show(display, event)
        seen.append(event)
        if len(seen) == 5 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    TrainingDisplay.show = show_and_ask  # type: ignore[method-assign]


def count_evaluated() -> list[int]:
    """Return a list that will hold how many images were evaluated here by the end of each epoch."""
    normalize, score = vitrail.evaluation.metrics.normalize, vitrail.training.run.quick_scores
    seen, by_epoch = [0], []

    def count(raw_BCHW: Tensor, *rest: Any) -> Tensor:
        seen[0] += len(raw_BCHW)
        return normalize(raw_BCHW, *rest)

    def note(*args: Tensor) -> tuple[float, float]:
        by_epoch.append(seen[0])
        return score(*args)

    vitrail.evaluation.metrics.normalize = count
    vitrail.training.run.quick_scores = note
    return by_epoch


def command_lines() -> dict[str, Any]:
    """Run the command line: to the end, with a wrong flag, and with a signal to one rank."""
    vitrail.data.datasets.load_shapes = few_shapes  # type: ignore[assignment]
    vitrail.training.run.EVALUATION_CHUNK = 4
    evaluated = count_evaluated()
    vitrail.training.run.plot_run = lambda *_: []  # plots take a second
    codes = [
        code_of("--folder_name", "single", "--dropout", "0"),
        code_of("--bach_size", "3"),
        code_of("--folder_name", "single"),
        code_of("--batch_size", "1"),
    ]
    two_epochs = evaluated[:2]
    ask_one_to_stop()
    stopped = code_of("--folder_name", "stopped")
    return {"codes": codes, "evaluated": two_epochs, "stopped": stopped}


def code_of(*words: str) -> Any:
    """Return the exit code of a command line."""
    try:
        return main([*WORDS, *words])
    except SystemExit as stop:
        return stop.code


def be_rank(rank: int, folder: Path, port: str) -> None:
    """Run everything as one of two ranks, and write the results."""
    os.chdir(folder)
    words = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    with distributed.joined():
        found = together(folder)
        del os.environ[
            "TORCHELASTIC_USE_AGENT_STORE"
        ]  # or each run would use the store of the last one
        torch.save({**found, **command_lines()}, folder / f"{rank}.pt")


if __name__ == "__main__":
    child = os.fork()
    try:
        be_rank(0 if child else 1, Path(sys.argv[1]), sys.argv[2])
        code = 0
    except BaseException:  # noqa: BLE001, a fork must end here, whatever happens
        traceback.print_exc()
        code = 1
    if child:
        code = max(code, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
