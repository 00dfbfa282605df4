"""The content of a run folder, compared bit for bit."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faults.child import WORDS, Child
from vitrail.training.state import checkpoint_folders
from vitrail.weights.checkpoint import load_info, load_training, load_weights, read_pointer, step_of


@dataclass(frozen=True)
class Truth:
    """An undisturbed run, whose end every other run must reach."""

    rows: list[dict[str, Any]]
    losses: dict[int, str]
    result: dict[str, Any]
    best: str
    states: dict[int, dict[str, Tensor]]
    """All tensors after each epoch."""

    @property
    def steps(self) -> int:
        """Updates of the run."""
        return max(self.losses)


@functools.cache
def undisturbed(*words: str) -> Truth:
    """Train without any fault."""
    with tempfile.TemporaryDirectory() as name:
        return train_and_read(Path(name), *words)


def train_and_read(cwd: Path, *words: str) -> Truth:
    """Train and return everything."""
    child = Child(cwd, *WORDS, *words, "--folder_name", "run", "--keep_checkpoints", "0")
    assert child.wait() == 0, child.errors
    run = cwd / "output/run"
    states = {step_of(folder): tensors(folder) for folder in folders(run)}
    best = read_pointer(run / "checkpoints", "BEST").name
    return Truth(rows(run), losses(cwd), result(run), best, states)


def folders(run: Path) -> list[Path]:
    """Return the checkpoints of a run."""
    return checkpoint_folders(run / "checkpoints")


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return everything a checkpoint holds, checked against its hashes."""
    load_info(folder)
    training = {f"training.{name}": tensor for name, tensor in load_training(folder).items()}
    return {**load_weights(folder), **training}


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without durations and dates."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [timeless(json.loads(line)) for line in lines]


def result(run: Path) -> dict[str, Any]:
    """Return result.json without durations and dates."""
    return timeless(json.loads((run / "result.json").read_text()))


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    """Remove durations and dates."""
    return {k: v for k, v in values.items() if "second" not in k and k != "finished"}


def losses(cwd: Path) -> dict[int, str]:
    """Return the loss of every update, from the logs of all processes; they must agree."""
    found: dict[int, str] = {}
    for log in sorted(cwd.glob("*.losses")):
        for line in log.read_bytes().split(b"\n")[:-1]:
            step, loss = line.decode().split()
            assert found.setdefault(int(step), loss) == loss, f"two losses of update {step}"
    return found


def require_valid(run: Path, truth: Truth) -> int:
    """Compare every checkpoint with the truth; return the step of the newest."""
    newest = 0
    for folder in folders(run):
        step = step_of(folder)
        state = tensors(folder)
        if step in truth.states:
            require_equal(state, truth.states[step], folder.name)
        newest = step
    for name in ("LAST", "BEST"):
        if (run / "checkpoints" / name).exists():
            read_pointer(run / "checkpoints", name)
    return newest


def require_end(cwd: Path, truth: Truth, *, best: bool = True) -> None:
    """Compare a finished run with the truth."""
    run = cwd / "output/run"
    assert require_valid(run, truth) == truth.steps, "the last checkpoint is missing"
    assert losses(cwd) == truth.losses, "different losses"
    if best:
        assert rows(run) == truth.rows, "different metrics"
        assert read_pointer(run / "checkpoints", "BEST").name == truth.best, (
            "different best checkpoint"
        )
        assert result(run) == truth.result, "different result"
    left = [path.name for path in (run / "checkpoints").glob(".*")]
    assert not left, f"left behind: {left}"


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    """Compare tensors bit for bit."""
    assert one.keys() == other.keys(), f"{what}: different tensors"
    wrong = [name for name in one if not torch.equal(one[name], other[name])]
    assert not wrong, f"{what}: not equal: {wrong[:3]}"


def resume_run(cwd: Path, *words: str, **plan: Any) -> Child:
    """Start the run of a folder, or resume it, as a user would."""
    if (cwd / "output/run/config.json").exists():
        return Child(cwd, "train", "--resume", "output/run", **plan)
    return Child(cwd, *WORDS, *words, "--folder_name", "run", **plan)


def finish(cwd: Path, truth: Truth, *words: str, best: bool = True) -> None:
    """Resume to the end without any fault, and compare with the truth."""
    child = resume_run(cwd, *words)
    assert child.wait() == 0, child.errors
    require_end(cwd, truth, best=best)


def require_one_line(child: Child, *, codes: tuple[int, ...] = (1, 2)) -> None:
    """Require that a command ended with one clear error."""
    code = child.wait()
    errors = [line for line in child.errors.splitlines() if line.startswith("vitrail: ")]
    assert "Traceback" not in child.errors, child.errors[-2000:]
    assert code in codes, f"exit code {code}: {child.errors[-500:]}"
    assert len(errors) == 1, f"{len(errors)} errors: {child.errors[-500:]}"
