"""``vitrail train``."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from vitrail.cli import STARTED, describe_error
from vitrail.cli.console import err, number_table, out, print_err, print_out, waiting
from vitrail.cli.parsing import parse, parse_known
from vitrail.config.files import RESUME_OVERRIDES, from_json, read_json, toml_sections
from vitrail.config.presets import get_preset
from vitrail.config.settings import ARRAYS, Config, Dataset
from vitrail.errors import (
    CheckpointError,
    ConfigError,
    OutputError,
    TrainingError,
    VitrailError,
    printable,
)

if TYPE_CHECKING:
    from vitrail.data.manifest import Manifest
    from vitrail.training.run import Run

DEFAULT_PRESET = "quick"
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torchrun sets for each process."""
SHOWN_CLASSES = 20
"""Maximum number of classes with their own row."""


@dataclass(frozen=True)
class StartOptions:
    """Where the settings come from; every other flag overrides them."""

    preset: str = ""
    """A complete configuration by name (vitrail info lists them)."""
    config: Path | None = None
    """A TOML file of settings, which override the preset's."""
    resume: Path | None = None
    """Resume the run in this folder, with its own settings."""
    json: bool = False
    """Print the result as JSON on standard output."""


@dataclass(frozen=True)
class FirstOptions(StartOptions):
    """What must be known before the other flags get defaults."""

    init: str = ""
    n_attention_heads: int | None = None
    dataset: Dataset | None = None
    data_path: Path | None = None


@dataclass(frozen=True)
class TrainOptions(Config, StartOptions):
    """Train a Vision Transformer.

    Any flag below overrides the preset's value; --batch_size and --batch-size are the same flag.

    The flags that most people need (all others have good defaults):
      --preset                     quick, fast, small, reference, ...: see vitrail info
      --dataset, --data_path       cifar10, shapes, or folder: one folder of pictures per class
      --image_size, --patch_size   sides of the model's pictures and patches, in pixels
      --epochs, --learning_rate    how long, and how fast
      --init, --resume             start from the weights of a model; continue a run
      --folder_name                name of the run's folder in output/

    For example:
      vitrail train --preset quick
      vitrail train --preset fast --epochs 6 --folder_name six
      vitrail train --dataset folder --data_path my_pictures --image_size 64 --patch_size 8
      vitrail train --init cifar10 --new_head --dataset folder --data_path my_pictures
      vitrail train --resume output/six
    """


def command(args: Sequence[str], *, prog: str = "vitrail train", name: str = "") -> int:
    """Run ``vitrail train``; ``name`` is the default name of the run folder."""
    with _joined_processes() as on_leader:
        start, settings = on_leader(read, args, prog)
        if start.resume is not None:
            run = _resume(start.resume, settings)
        else:
            manifest = on_leader(_list_data, settings)
            run = _begin(settings, name or start.preset, manifest)
        return follow(run, as_json=start.json) if run else 0


@contextmanager
def _joined_processes() -> Iterator[Callable[..., Any]]:
    """Join the processes that torchrun started, if it did; all but the first stop printing.

    Yields a function that calls another one on the first process only and returns its result on
    all. An error occurs on every process: the first one reports it, the others only exit.
    """
    if not all(os.environ.get(name) for name in TORCHRUN):
        yield lambda function, *arguments: function(*arguments)
        return
    from vitrail.runtime import distributed

    with distributed.joined():
        leader = distributed.is_leader()
        quiet = out.quiet, err.quiet
        out.quiet = err.quiet = not leader
        try:
            yield distributed.on_leader
        except VitrailError as error:
            if leader:
                raise
            sys.exit(describe_error(error)[1])
        finally:
            out.quiet, err.quiet = quiet


def read(args: Sequence[str], prog: str) -> tuple[TrainOptions, Config]:
    """Return the options, and the settings among them."""
    start, _ = parse_known(FirstOptions, args, prog=prog, add_help=False)
    if start.resume is None:
        start = dataclasses.replace(start, preset=start.preset or DEFAULT_PRESET)
        base = read_start(start)
    elif start.config is not None or start.preset:
        raise ConfigError(
            "--resume continues with the run's own settings: leave out --preset and --config"
        )
    elif not (start.resume / "config.json").is_file():
        raise CheckpointError(f"{start.resume}: not a run folder (it has no config.json)")
    else:
        base = from_json(read_json(start.resume / "config.json"))
    defaults = TrainOptions(start.preset, start.config, start.resume, start.json, **vars(base))
    options = parse(TrainOptions, args, prog=prog, default=defaults)
    settings = Config(**{name: getattr(options, name) for name in vars(base)})
    if start.resume is not None:
        _refuse_changes(base, settings, start.resume)
    return options, settings


def read_start(start: FirstOptions) -> Config:
    """Return the settings of a preset, overridden by the model of --init, then by a TOML file.

    For gray arrays, also set the number of channels.
    """
    given = {} if start.config is None else toml_sections(start.config)
    base = from_json(given, get_preset(start.preset))
    init = start.init or base.training.init
    if not init:
        asked = "n_channels" in given.get("model", {})
        gray = not asked and _is_gray(start.dataset or base.data.dataset, start, base)
        return from_json({"model": {"n_channels": 1}}, base) if gray else base
    from vitrail.weights.pretrained import with_init

    theirs = with_init(base, init, start.n_attention_heads)
    return from_json({**given, "training": {**given.get("training", {}), "init": init}}, theirs)


def _is_gray(dataset: Dataset, start: FirstOptions, base: Config) -> bool:
    """Return whether the dataset consists of arrays of gray pictures only."""
    if dataset not in ARRAYS:
        return False
    from vitrail.data.sources import is_gray

    path = start.data_path or base.data.data_path
    return is_gray(dataclasses.replace(base.data, dataset=dataset, data_path=path))


def _refuse_changes(old: Config, new: Config, folder: Path) -> None:
    """Refuse flags that cannot be changed with --resume."""
    before, after = old.flat(), new.flat()
    changed = [name for name in before if before[name] != after[name]]
    refused = [f"--{name}" for name in changed if name not in RESUME_OVERRIDES]
    if refused:
        allowed = ", ".join(f"--{name}" for name in RESUME_OVERRIDES)
        raise ConfigError(
            f"--resume keeps the run's settings: leave out {', '.join(refused)} (only {allowed} "
            f"may change), or start another run from its weights with --init {folder}"
        )


def _list_data(settings: Config) -> "Manifest | None":
    """Show what a folder or a source of arrays holds, before anything slow is loaded.

    For a folder, return the files.
    """
    if settings.data.dataset in ARRAYS:
        from vitrail.data.arrays import class_counts
        from vitrail.data.sources import open_source

        source = open_source(settings.data)
        _show_counts(source.name, class_counts(source, settings.data), gray=source.gray)
    if settings.data.dataset != "folder":
        return None
    from vitrail.data.manifest import count_files, scan, summary

    manifest = scan(settings.data.data_path, settings.data.validation_images)
    shown = manifest.limited(settings.data)
    _show_counts(str(manifest.root), count_files(shown), left_out=summary(shown))
    return manifest


def _show_counts(
    name: str, counts: Sequence[tuple[str, list[int]]], *, gray: bool = False, left_out: str = ""
) -> None:
    """Print the number of training, validation and test pictures of each class."""
    totals = [sum(column) for column in zip(*(row for _, row in counts), strict=True)]
    kind = "gray pictures" if gray else "pictures"
    print_err(f"{name}: {len(counts)} classes, {sum(totals):,} {kind}")
    table = number_table("class", "train", "validation", "test")
    for name, row in counts[:SHOWN_CLASSES]:
        table.add_row(Text(printable(name)), *(f"{number:,}" for number in row))
    if len(counts) > SHOWN_CLASSES:
        table.add_row(f"… and {len(counts) - SHOWN_CLASSES} more classes")
    table.add_section()
    table.add_row("total", *(f"{number:,}" for number in totals))
    err.print(table)
    if left_out:
        print_err(left_out)
    if not totals[2]:
        print_err("There is no test split: the run will have no test score.")


def _begin(settings: Config, name: str, manifest: "Manifest | None") -> "Run | None":
    """Start a run in a new folder, or resume it after a restart by torchrun."""
    with waiting("loading PyTorch"):
        from vitrail.runtime import distributed
        from vitrail.runtime.hardware import choose_rank_device
        from vitrail.training.run import Run
        from vitrail.training.run_folder import hold, is_unused, release

    choose_rank_device(settings.run.device)
    folder, begun = distributed.on_leader(_choose_folder, settings, name)
    if begun:
        return _resume(folder, settings)
    held = hold(folder)  # until the run holds it itself
    try:
        with waiting(f"{folder}: loading the data and making the model"):
            run = Run.start(settings, folder, manifest)
    except BaseException:
        if distributed.is_leader():
            release(folder)  # Windows cannot remove open files
            if is_unused(folder):
                shutil.rmtree(folder)
        raise
    del held
    return run


def _choose_folder(settings: Config, name: str) -> tuple[Path, bool]:
    """Return the run's folder, and whether it has a checkpoint to resume from."""
    from vitrail.runtime import distributed
    from vitrail.training.run_folder import new_folder

    known = distributed.load_value("run folder")
    if known is not None and Path(known).is_dir():
        return Path(known), any(Path(known, "checkpoints").glob("step-*"))
    folder = new_folder(settings.run.output_path, settings.run.folder_name, name)
    distributed.store_value("run folder", str(folder))
    return folder, False


def _resume(folder: Path, settings: Config) -> "Run | None":
    """Resume a run; if it is finished, only print that."""
    from vitrail.runtime import distributed
    from vitrail.training.run import Run

    if distributed.on_leader((folder / "result.json").is_file):
        print_err(
            f"{folder}: this run is finished, its result is in {folder / 'result.json'}; to train "
            f"longer, start another run from its weights: vitrail train --init {folder}"
        )
        return None
    with waiting(f"{folder}: loading the data and the checkpoint"):
        run = Run.resume(folder, settings)
    print_err(f"resuming at step {run.state.step:,}/{run.total_steps:,}")
    return run


def follow(run: "Run", *, as_json: bool = False) -> int:
    """Train to the end, or stop at a signal and save; print the progress, then the result."""
    from vitrail.runtime import distributed

    for notice in run.notices:
        print_err(notice)
    _describe(run)
    startup = time.perf_counter() - STARTED
    resume = f"resume with: vitrail train --resume {run.folder}"
    try:
        stopped = _train(run)
        # Now everything is saved; only the test and the plots are missing.
        result = {} if stopped else run.finish()
    except KeyboardInterrupt:
        stopped = signal.SIGINT
    except OutputError as error:
        raise TrainingError(f"{error}; {resume}") from error
    except Exception as error:
        if run.saved is not None:
            error.add_note(resume)
        raise
    if stopped:
        print_err(f"stopped and saved; {resume}")
        return 128 + stopped
    if as_json:
        print_out(json.dumps(result))
    else:
        _conclude(run, result, startup)
    if problems := distributed.on_leader(lambda: run.problems):
        raise TrainingError(f"{'; '.join(problems)}; everything else is in {run.folder}/")
    return 0


def _train(run: "Run") -> int:
    """Train to the end, or until a signal arrives at any of the processes: save and return it."""
    from vitrail.cli.progress import TrainingDisplay, stop_requests
    from vitrail.runtime import distributed

    with stop_requests() as stop, TrainingDisplay(run, err) as display:
        for event in run.train(stopping=lambda: bool(stop.signal)):
            display.show(event)
            if stopped := distributed.highest(stop.signal):
                run.save()
                return stopped
        return distributed.highest(stop.signal)


def _describe(run: "Run") -> None:
    """Print what is about to be trained."""
    from vitrail.runtime import distributed

    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    splits = ", ".join(f"{len(images):,} {name}" for name, images in run.monitored.items())
    data = run.config.data
    name = data.data_path if data.dataset == "folder" or data.dataset in ARRAYS else data.dataset
    processes = f"{distributed.count()} processes on " if distributed.count() > 1 else ""
    print_err(
        f"{run.folder}: {parameters:,} parameters on {name}, "
        f"{run.train_images:,} training images{', ' if splits else ''}{splits}; "
        f"{processes}{run.device.type}, {run.precision}, "
        f"{'compiled' if run.compiled else 'not compiled'}"
    )


def _conclude(run: "Run", result: Mapping[str, Any], startup: float) -> None:
    """Print the result, the seconds it took and what to try next."""
    seconds, folder = result["seconds"], run.folder
    epochs = f"{result['epochs']:,} epoch{'' if result['epochs'] == 1 else 's'}"
    goal = run.config.run.stop_at_accuracy
    if goal is not None:
        out.print(
            f"\nvalidation accuracy {goal:.2%} {'' if run.is_enough() else 'not '}reached "
            f"in {seconds:,.1f} s of training ({epochs})"
        )
    print_out(f"\n{folder}", style="bold")
    table = number_table("", "accuracy", "loss", "images", "95% interval")
    for split in ("validation", "test"):
        if scores := result[split]:
            row = [split, f"{scores['accuracy']:.2%}", f"{scores['loss']:.4f}"]
            row.append(f"{scores.get('images') or len(run.monitored[split]):,}")
            if "accuracy_interval" in scores:
                row.append("{:.1%} to {:.1%}".format(*scores["accuracy_interval"]))
            table.add_row(*row)
    if table.row_count:
        out.print(table)
    if not result["test"]:
        print_out("There is no test split, so there is no test score.")
    print_out(_describe_calibration(result))
    kept = f"best epoch: {result['best_epoch']}" if result["validation"] else "last epoch kept"
    print_out(
        f"{epochs} ({result['petaflops']:.2g} PFLOP) in {seconds:,.0f} s of training "
        f"(plus {startup:,.1f} s of start-up and {result['evaluation_seconds']:,.0f} s of "
        f"evaluation), {result['images_per_second']:,.0f} images/s; "
        f"{kept}; curves, confusion matrix and checkpoints in {folder}/\n\n"
        "Try next:\n"
        f"  vitrail test {folder}\n"
        f"  vitrail predict {folder} PICTURE\n"
        f"  vitrail explain {folder} PICTURE\n"
        f"  vitrail info {folder}"
    )


def _describe_calibration(result: Mapping[str, Any]) -> str:
    """Return what the temperature does to the probabilities."""
    test, temperature = result["test"], result["temperature"]
    if temperature is None:
        return "No temperature was fitted to the probabilities, as there are no validation images."
    fitted = f"Probabilities use temperature {temperature:.2f}, fitted on validation"
    if not test:
        return f"{fitted}."
    return (
        f"{fitted}: calibration error on test {test['expected_calibration_error']:.2%}, "
        f"without it {test['calibration_error_before']:.2%}."
    )
