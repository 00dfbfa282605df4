"""Each shell command of the documents runs, at small sizes, or is listed here with the reason."""

import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layouts import make_state
from vitrail.cli import main
from vitrail.cli.reference import run_test, run_train
from vitrail.config.files import from_json
from vitrail.training.run import Run

pytestmark = pytest.mark.usefixtures("rough_plots", "small_sheets")

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "docs/index.md", "docs/tutorial/README.md", *sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("docs/how-to/*.md")
)]  # fmt: skip
PROGRAMS = (
    "bash", "curl", "hf", "jupyter", "make", "pip", "pytest", "python", "torchrun", "vitrail",
)  # fmt: skip

SKIPPED = {
    "pip install": "needs a network",
    "hf auth login": "needs a network",
    "vitrail push": "needs a network",
    "vitrail predict --model_path hf:": "needs a network",
    "vitrail train --init hf:": "needs a network",
    "vitrail explain photo.jpg --model_path hf:": "needs a network",
    "vitrail explain output/mine-dino": "needs a network",
    "vitrail train --dataset hf": "needs a network",
    "vitrail train --dataset idx": "needs MNIST: tests/test_sources.py writes such files",
    "vitrail train --dataset npz": "needs MedMNIST: tests/test_sources.py writes such files",
    "vitrail explain photo.jpg --model_path dinov2-small": "needs the weights of DINOv2",
    "vitrail train --init dinov2-small": "needs the weights of DINOv2",
    "vitrail train --wandb": "needs an account",
    "vitrail train --mlflow": "needs mlflow, which no extra installs",
    "vitrail serve": "does not end: tests/test_serve.py starts it",
    "jupyter lab": "does not end: tests/test_tutorial.py executes the notebooks",
    "pytest": "runs this test",
    "torchrun --nproc-per-node gpu": "needs a GPU",
    "torchrun --nnodes": "needs two machines",
    "bash benchmarks/peers.sh": "needs a network",
    "PEERS=peers": "needs a GPU",
    "bash benchmarks/gpu_records.sh --dry_run": "takes minutes: tests/test_bench_slow.py",
    "python benchmarks/bench.py": "takes minutes: tests/test_bench_slow.py",
}
"""The commands that begin so are not run here."""

SLOW = (
    "torchrun", "vitrail export", "vitrail predict --model_path quick.onnx",
    "vitrail explain photos/", "vitrail explain cat.png dog.png", "vitrail explain photo.jpg",
    "vitrail explain cat.png --method similarity", "vitrail explain cifar10 examples/cat.jpg",
    "vitrail train --dataset folder --data_path my_pictures --init", "vitrail train --tensorboard",
    "curl --data-binary @cat.jpg http://127.0.0.1:8000/api/page",
    "curl --data-binary @cat.jpg 'http://127.0.0.1:8000/api/curve",
)  # fmt: skip
"""The commands that begin so take seconds also when they are small."""

TRAIN = (
    "--epochs 1 --warmup_epochs 0 --num_train_images 60 --num_test_images 20 "
    "--validation_images 20 --batch_size 20 --num_workers 0"
)
MODEL = (
    "--image_size 32 --patch_size 8 --stem patch --embed_dim 12 --n_attention_heads 3 --n_layers 1"
)
SCORE = "--images 10 --method rollout,attention"
SMALLER = {
    "vitrail train": f"{TRAIN} {MODEL}",
    "vitrail train --init": TRAIN,
    "vitrail train --preset fast": TRAIN,
    "vitrail train --preset small": TRAIN,
    "vitrail train --dataset folder --data_path my_pictures --init": TRAIN,
    "vitrail train --resume": "",
    "torchrun --nproc-per-node 2": f"{TRAIN} {MODEL} --folder_name ranks",
    "torchrun --nproc-per-node 2 --max-restarts": f"{TRAIN} {MODEL} --folder_name restarted",
    "torchrun --nproc-per-node 2 -m vitrail train --resume": "",
    "vitrail sweep": f"{TRAIN} --embed_dim 12 --n_attention_heads 3 --trials 1",
    "vitrail explain --score": SCORE,
    "vitrail explain --model_path output/quick --score": SCORE,
    "vitrail inspect": "--images 10",
    "vitrail convert deit.pth": "--n_attention_heads 3",
    "vitrail convert deit.pth d.safetensors --image_size": "--n_attention_heads 3 --image_size 65",
    "vitrail train --dataset folder --data_path my_pictures --init cifar10 --new_head "
    "--folder_name mine": f"{TRAIN} --folder_name mine-again",
    "python train.py": f"{TRAIN} --embed_dim 12 --n_attention_heads 3 --n_layers 1",
}
"""What is appended to the commands that begin so, the longest beginning that fits; the last of a
repeated flag counts."""


def commands_of(name: str) -> list[str]:
    """Return the commands in the indented lines of a document."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4,6}(\S.*)", text, re.MULTILINE)
    words = (word for line in lines for word in line.partition("  #")[0].split(" && "))
    program = re.compile(rf"([A-Z_]+=\S+ )?({'|'.join(PROGRAMS)}) ")
    return [re.sub(" +", " ", word).strip() for word in words if program.match(f"{word} ")]


COMMANDS: dict[str, str] = {}
"""The commands in order, each with the first document that has it."""
for _name in DOCUMENTS:
    for _command in commands_of(_name):
        COMMANDS.setdefault(_command, _name)


def reason_of(command: str) -> str | None:
    return next((why for start, why in SKIPPED.items() if command.startswith(start)), None)


def smaller(command: str) -> str:
    fitting = [start for start in SMALLER if command.startswith(start)]
    return f"{command} {SMALLER[max(fitting, key=len)]}" if fitting else command


def write_pictures(folder: Path) -> None:
    """Write the pictures that the documents name."""
    random = np.random.default_rng(1)
    words = "photo.jpg cat.jpg cat.png dog.jpg dog.png new.jpg photos/a.jpg photos/b.png"
    names = [*words.split(), "more/c.jpg"]
    names += [*(f"my_pictures/{c}/{n}.png" for c in "ab" for n in range(30))]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_cifar(folder: Path) -> None:
    """Write noise in CIFAR-10's layout."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(5)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        labels = [index % 10 for index in range(30)]
        data = random.integers(0, 256, (30, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}))


def write_runs() -> None:
    """Write a finished run on shapes under two names, and one on CIFAR-10 that can be resumed."""
    model = {
        "image_size": 32, "patch_size": 8, "embed_dim": 12, "n_layers": 1, "n_attention_heads": 3,
        "stem": "patch", "position": "learned", "head": "linear",
    }  # fmt: skip
    training = {"batch_size": 20, "epochs": 1, "warmup_epochs": 0}
    sizes = {"num_train_images": 60, "num_test_images": 20, "validation_images": 20}
    settings: dict[str, Any] = {"model": model, "training": training}
    for dataset, name in (("cifar10", "reference"), ("shapes", "quick")):
        folder = Path("output", name)
        folder.mkdir(parents=True)
        config = from_json({**settings, "data": {"dataset": dataset, **sizes}})
        run = Run.start(config, folder)
        run.save()
    for _ in run.train():
        pass
    run.finish()
    del run
    shutil.copytree("output/quick", "output/mine")


def write_weights() -> None:
    """Write the weights of other systems."""
    torch.save(make_state("timm"), "deit.pth")
    np.savez("B_16.npz", **{name: t.numpy() for name, t in make_state("google").items()})
    shutil.copy(ROOT / "tests/reference/layer3-dim32.pt", "vit-layer6-32-cifar10-199.pt")
    for name in ("vit.safetensors", "mine.safetensors"):
        assert main(["convert", "output/quick", name]) == 0
    Path("model/NAME").mkdir(parents=True)
    assert main(["convert", "output/reference", "model/NAME/FILE.safetensors"]) == 0
    for program in ("train.py", "test.py", "examples", "docs", "benchmarks"):
        Path(program).symlink_to(ROOT / program)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all files that the documents name, in which their commands run in order."""
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_pictures(folder)
        write_cifar(folder / "data/cifar-10-batches-py")
        write_runs()
        write_weights()
        yield folder


def run(command: str) -> int | str | None:
    """Run a command in this process and return its exit code."""
    program, *words = shlex.split(command)
    try:
        if program == "vitrail":
            return main(words)
        return {"train.py": run_train, "test.py": run_test}[words[0]](words[1:])
    except SystemExit as end:
        return end.code


def ask_server(command: str) -> None:
    """Send the request of a curl command to the server's app."""
    testclient = pytest.importorskip("starlette.testclient")
    from vitrail.serve.app import build_app
    from vitrail.serve.models import Shelf

    words = shlex.split(command)
    (url,) = (word for word in words if word.startswith("http"))
    app = build_app(Shelf(["cifar10"], Path("nowhere")), "127.0.0.1")
    with testclient.TestClient(app, base_url="http://127.0.0.1:8000") as client:
        if "--data-binary" in words:
            picture = words[words.index("--data-binary") + 1].removeprefix("@")
            answer = client.post(url, content=Path(picture).read_bytes())
        else:
            answer = client.get(url)
    assert answer.status_code == 200, answer.text


def mark(command: str) -> Any:
    """Return a command as a parameter of a test: skipped or slow, where it must be."""
    marks = [pytest.mark.skip(reason=reason)] if (reason := reason_of(command)) else []
    if any(command.startswith(start) for start in SLOW):
        marks += [pytest.mark.slow]
    return pytest.param(command, marks=marks, id=f"{COMMANDS[command]}: {command}")


@pytest.mark.parametrize("command", [mark(command) for command in COMMANDS])
def test_a_command_runs(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith("curl"):
        ask_server(command)
    elif command.startswith("torchrun"):
        words = shlex.split(smaller(command))
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]], check=True)
    else:
        assert run(smaller(command)) == 0, capsys.readouterr().err


@pytest.mark.parametrize("start", [*SKIPPED, *SLOW, *SMALLER])
def test_every_exception_is_of_a_command(start: str) -> None:
    assert any(command.startswith(start) for command in COMMANDS)
