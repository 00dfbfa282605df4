"""Weights with bytes flipped, cut, swapped, emptied, other files cut: never a wrong model."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from faults.folder import folders, require_equal, tensors
from faults.tally import Tally
from vitrail.config.settings import Config
from vitrail.errors import CheckpointError
from vitrail.training.run import Run
from vitrail.training.state import recover
from vitrail.weights import pretrained
from vitrail.weights.checkpoint import (
    load_info,
    load_weights,
    load_weights_file,
    read_pointer,
    save_weights_file,
)

States = dict[str, dict[str, Tensor]]
Change = Callable[[bytes, random.Random], bytes]


def flip_bit(content: bytes, random_: random.Random) -> bytes:
    """Flip one bit."""
    place = random_.randrange(len(content))
    return replaced(content, place, bytes([content[place] ^ 1 << random_.randrange(8)]))


def flip_bytes(content: bytes, random_: random.Random) -> bytes:
    """Overwrite a few bytes with noise."""
    return replaced(
        content, random_.randrange(len(content)), random_.randbytes(random_.choice([1, 2, 8]))
    )


def zero(content: bytes, random_: random.Random) -> bytes:
    """Overwrite a block with zeros, like a lost sector."""
    start = random_.randrange(len(content))
    return replaced(content, start, bytes(min(512, len(content) - start)))


def cut(content: bytes, random_: random.Random) -> bytes:
    """Truncate."""
    return content[: random_.randrange(len(content))]


def empty(_content: bytes, _random: random.Random) -> bytes:
    """Truncate to nothing."""
    return b""


def longer(content: bytes, random_: random.Random) -> bytes:
    """Append bytes."""
    return content + random_.randbytes(random_.choice([1, 8, 100]))


def swap(content: bytes, random_: random.Random) -> bytes:
    """Swap two bytes, or two halves."""
    if random_.random() < 0.3:
        return content[len(content) // 2 :] + content[: len(content) // 2]
    one, other = sorted(random_.randrange(len(content)) for _ in range(2))
    changed = bytearray(content)
    changed[one], changed[other] = changed[other], changed[one]
    return bytes(changed)


def digit(content: bytes, random_: random.Random) -> bytes:
    """Change a decimal digit: the file still parses."""
    places = [place for place, byte in enumerate(content) if chr(byte).isdecimal() and byte < 128]
    if not places:
        return b""
    return replaced(content, random_.choice(places), random_.choice("0123456789").encode())


def replaced(content: bytes, place: int, new: bytes) -> bytes:
    """Return the content with bytes replaced from one position on."""
    return content[:place] + new + content[place + len(new) :]


CHANGES: list[Change] = [flip_bit, flip_bytes, zero, cut, empty, longer, swap, digit]


@dataclasses.dataclass(frozen=True)
class Intact:
    """A finished, undamaged run and all its content."""

    folder: Path
    config: Config
    states: States
    best: str
    file: Path
    """The best weights in one file."""


def intact_run(folder: Path, config: Config) -> Intact:
    """Train, keeping every checkpoint, from the first seed whose best epoch is not the last.

    So recovery must distinguish LAST from BEST.
    """
    data = dataclasses.replace(config.data, validation_images=40)
    for seed in range(100):
        run_config = dataclasses.replace(config.run, keep_checkpoints=0, seed=seed)
        run = begun(folder / f"run-{seed}", dataclasses.replace(config, data=data, run=run_config))
        for _ in run.train():
            pass
        best, last = (read_pointer(run.checkpoints, name) for name in ("BEST", "LAST"))
        if best != last:
            break
    states = {path.name: tensors(path) for path in folders(run.folder)}
    file = folder / "weights.safetensors"
    save_weights_file(file, load_info(best), load_weights(best))
    return Intact(run.folder, run.config, states, best.name, file)


def begun(folder: Path, config: Config) -> Run:
    """Start a run in a new folder."""
    folder.mkdir(parents=True)
    return Run.start(config, folder)


def mutations(folder: Path, config: Config, *, times: int, ends: int, seed: int = 7) -> Tally:
    """Damage one place in each of several copies of a run; train ``ends`` of them to the end."""
    tally = Tally("A changed byte, a cut, a swap in a checkpoint; a cut in LAST or BEST")
    intact, random_ = intact_run(folder / "intact", config), random.Random(seed)
    every = max(1, times // max(1, ends))
    for number in range(times):
        copy = folder / f"copy-{number}"
        shutil.copytree(intact.folder, copy)
        file = folder / f"weights-{number}.safetensors"
        shutil.copy(intact.file, file)
        what, damaged = damage(copy, file, random_, number)
        with tally.trial(f"{number}: {what}"):
            require_right_or_named(copy, file, damaged, intact)
            require_recovery(copy, damaged, intact, to_end=number % every == 0)
        shutil.rmtree(copy)
        file.unlink()
    return tally


def damage(copy: Path, file: Path, random_: random.Random, number: int) -> tuple[str, list[Path]]:
    """Damage one file, or swap two; return the kind of damage and the files."""
    checkpoints = copy / "checkpoints"
    pointers = [checkpoints / "LAST", checkpoints / "BEST"]
    steps = folders(copy)
    if number % 8 == 0:
        pointer, change = random_.choice(pointers), random_.choice([cut, empty])
        pointer.write_bytes(change(pointer.read_bytes(), random_))
        return f"{change.__name__} in {pointer.name}", [pointer]
    kind = random_.choices(["bytes", "file", "folder"], [10, 2, 1])[0]
    if kind == "folder" or number % 8 == 2:
        exchange(*(pair := random_.sample(steps, 2)))
        return f"exchanged {pair[0].name} and {pair[1].name}", pair
    if kind == "file":
        name = random_.choice(["checkpoint.json", "model.safetensors", "training.safetensors"])
        pair = [step / name for step in random_.sample(steps, 2)]
        exchange(*pair)
        return f"exchanged {pair[0].name} of {pair[0].parent.name} and another", pair
    inside = sorted(random_.choice([steps[-1], random_.choice(steps)]).iterdir())
    path = random_.choice([*inside, file])
    change = random_.choice([cut, empty] if path.suffix == ".json" else CHANGES)
    path.write_bytes(change(path.read_bytes(), random_))
    return f"{change.__name__} in {path.parent.name}/{path.name}", [path]


def exchange(one: Path, other: Path) -> None:
    """Swap two files or folders."""
    middle = one.with_name("middle")
    one.rename(middle)
    other.rename(one)
    middle.rename(other)


def named(error: CheckpointError, damaged: list[Path]) -> None:
    """Require that an error names what was damaged."""
    assert any(str(path) in str(error) for path in damaged), f"not named: {error}"


def require_right_or_named(copy: Path, file: Path, damaged: list[Path], intact: Intact) -> None:
    """Load everything: each part is correct to the bit, or refused by name."""
    for folder in folders(copy):
        try:
            state = tensors(folder)
        except CheckpointError as error:
            named(error, damaged)
        else:
            require_equal(state, intact.states[folder.name], folder.name)
    best = intact.states[intact.best]
    for load in (
        lambda: dict(pretrained.load(copy, device="cpu").model.state_dict()),
        lambda: load_weights_file(file)[1],
    ):
        try:
            weights = load()
        except CheckpointError as error:
            named(error, damaged)
        else:
            require_equal(weights, {name: best[name] for name in weights}, "the best model")


def require_recovery(copy: Path, damaged: list[Path], intact: Intact, *, to_end: bool) -> None:
    """Resume from the newest valid checkpoint, with a notice if another was skipped."""
    wrong = []
    for folder in folders(copy):
        try:
            tensors(folder)
        except CheckpointError:
            wrong.append(folder.name)
    newest = max(set(intact.states) - set(wrong))
    saved = recover(copy, intact.config)
    assert saved is not None, "started over"
    assert saved.folder.name == newest, f"resumed from {saved.folder.name}, not {newest}"
    state = {**saved.weights, **{f"training.{n}": t for n, t in saved.training.items()}}
    require_equal(state, intact.states[newest], "the resumed state")
    if newest != max(intact.states):
        assert any(path.name in " ".join(saved.notices) for path in damaged), "not reported"
    pretrained.load(copy, device="cpu")  # BEST names a valid one again
    if to_end:
        run = Run.resume(copy, intact.config)
        for _ in run.train():
            pass
        last = max(intact.states)
        require_equal(tensors(folders(copy)[-1]), intact.states[last], "the end")
