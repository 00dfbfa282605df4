"""``vitrail train``."""

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from vitrail.cli import STARTED, exit_code
from vitrail.cli.console import count, err, number_table, out, print_err, print_out
from vitrail.cli.parsing import parse, parse_known
from vitrail.config.files import RESUME_OVERRIDES, from_json, read_json, toml_sections
from vitrail.config.presets import get_preset
from vitrail.config.settings import Config
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

PROG = "vitrail train"
DEFAULT_PRESET = "quick"
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torchrun sets for each process."""
SHOWN_CLASSES = 20
"""Classes of a folder that get a row of their own."""


@dataclass(frozen=True)
class StartOptions:
    """Where the settings come from; every other flag overrides them."""

    preset: str = ""
    """A complete configuration by name (vitrail info lists them)."""
    config: Path | None = None
    """A TOML file of settings, which override the preset's."""
    resume: Path | None = None
    """Resume the run in this folder, with its own settings."""


@dataclass(frozen=True)
class InitOptions:
    """The initial weights, which must be known before the other flags have defaults."""

    init: str = ""
    n_attention_heads: int | None = None


@dataclass(frozen=True)
class TrainOptions(Config, StartOptions):
    """Train a Vision Transformer.

    Any flag below overrides the preset's value; --batch_size and --batch-size are the same flag.

    For example: vitrail train --preset fast --epochs 6 --folder_name six
    """


def command(args: Sequence[str], *, prog: str = PROG, name: str | None = None) -> int:
    """Run ``vitrail train``; ``name`` is the default name of the run folder."""
    with _joined_processes() as on_leader:
        start, settings = on_leader(read, args, prog)
        if start.resume is not None:
            return _resume(start.resume, settings)
        manifest = on_leader(_list_data, settings)
        return _begin(settings, name or start.preset, manifest)


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
            sys.exit(exit_code(error))
        finally:
            out.quiet, err.quiet = quiet


def read(args: Sequence[str], prog: str) -> tuple[StartOptions, Config]:
    """Return where the settings come from, and the settings."""
    start, _ = parse_known(StartOptions, args, prog=prog, add_help=False)
    if start.resume is None:
        start = dataclasses.replace(start, preset=start.preset or DEFAULT_PRESET)
        given = {} if start.config is None else toml_sections(start.config)
        base = from_json(given, get_preset(start.preset))
        base = _start_from_weights(base, given, args, prog)
    else:
        base = _read_settings(start)
    defaults = TrainOptions(**vars(start), **vars(base))
    options = parse(TrainOptions, args, prog=prog, default=defaults)
    settings = Config(**{name: getattr(options, name) for name in vars(base)})
    if start.resume is not None:
        _refuse_changes(base, settings, start.resume)
    return start, settings


def _read_settings(start: StartOptions) -> Config:
    """Return the settings of the run to resume."""
    assert start.resume is not None
    if start.config is not None or start.preset:
        raise ConfigError(
            "--resume continues with the run's own settings: leave out --preset and --config"
        )
    if not (start.resume / "config.json").is_file():
        raise CheckpointError(f"{start.resume}: not a run folder (it has no config.json)")
    return from_json(read_json(start.resume / "config.json"))


def _start_from_weights(
    base: Config, given: dict[str, dict[str, Any]], args: Sequence[str], prog: str
) -> Config:
    """Return the settings with the model of --init, if it is given.

    The model of the weights overrides the preset's; the TOML file overrides both.
    """
    asked, _ = parse_known(InitOptions, args, prog=prog, add_help=False)
    init = asked.init or base.training.init
    if not init:
        return base
    from vitrail.weights.pretrained import with_init

    theirs = with_init(base, init, asked.n_attention_heads)
    return from_json({name: given.get(name, {}) for name in ("model", "data")}, theirs)


def _refuse_changes(old: Config, new: Config, folder: Path) -> None:
    """Refuse flags that cannot be changed with --resume."""
    before, after = old.flat(), new.flat()
    changed = [f"--{name}" for name in before if before[name] != after[name]]
    refused = [flag for flag in changed if flag.removeprefix("--") not in RESUME_OVERRIDES]
    if refused:
        allowed = ", ".join(f"--{name}" for name in RESUME_OVERRIDES)
        raise ConfigError(
            f"--resume keeps the run's settings: leave out {', '.join(refused)} (only {allowed} "
            f"may change), or start another run from its weights with --init {folder}"
        )


def _list_data(settings: Config) -> "Manifest | None":
    """List the pictures of a folder and show what was found, before anything slow is loaded."""
    if settings.data.dataset != "folder":
        return None
    from vitrail.data.manifest import scan

    manifest = scan(settings.data.data_path, settings.data.validation_images)
    _show_manifest(manifest.limited(settings.data))
    return manifest


def _show_manifest(manifest: "Manifest") -> None:
    """Print how many pictures each class has in each split, and what was skipped."""
    from vitrail.data.manifest import SPLITS, class_counts, summary

    counts = class_counts(manifest)
    totals = _add_columns(counts)
    print_err(f"{manifest.root}: {len(counts)} classes, {sum(totals):,} pictures")
    table = number_table("class", *SPLITS)
    shown = counts if len(counts) <= SHOWN_CLASSES else counts[: SHOWN_CLASSES - 1]
    for name, row in shown:
        table.add_row(Text(printable(name)), *(f"{number:,}" for number in row))
    if rest := counts[len(shown) :]:
        table.add_row(f"{len(rest)} more", *(f"{number:,}" for number in _add_columns(rest)))
    table.add_section()
    table.add_row("total", *(f"{number:,}" for number in totals))
    err.print(table)
    if line := summary(manifest):
        print_err(line)
    if not totals[SPLITS.index("test")]:
        print_err("There is no test split: the run will have no test score.")


def _add_columns(counts: "Sequence[tuple[str, Sequence[int]]]") -> list[int]:
    """Return the sum of each column."""
    return [sum(column) for column in zip(*(row for _, row in counts), strict=True)]


def _begin(settings: Config, name: str, manifest: "Manifest | None") -> int:
    """Start a run in a new folder, or resume it after a restart by torchrun."""
    from vitrail.runtime import distributed
    from vitrail.runtime.hardware import choose_rank_device
    from vitrail.training.run import Run
    from vitrail.training.run_folder import hold, release

    choose_rank_device(settings.run.device)
    folder, begun = distributed.on_leader(_choose_folder, settings, name)
    if begun:
        return _resume(folder, settings)
    held = hold(folder)  # until the run holds it itself
    try:
        run = Run.start(settings, folder, manifest)
    except BaseException:
        if distributed.is_leader():
            release(folder)  # Windows removes no file that is open
            _remove_if_unused(folder)
        raise
    del held
    for notice in run.notices:
        print_err(notice)
    return follow(run)


def _choose_folder(settings: Config, name: str) -> tuple[Path, bool]:
    """Return the run's folder, and whether it has a checkpoint to resume from."""
    from vitrail.runtime import distributed
    from vitrail.training.run_folder import new_folder

    known = distributed.recall("run folder")
    if known is not None and Path(known).is_dir():
        return Path(known), any(Path(known, "checkpoints").glob("step-*"))
    folder = new_folder(settings.run.output_path, settings.run.folder_name, name)
    distributed.remember("run folder", str(folder))
    return folder, False


def _resume(folder: Path, settings: Config) -> int:
    """Resume a run; of a finished one, only report the result."""
    from vitrail.runtime import distributed
    from vitrail.training.run import Run

    if distributed.on_leader((folder / "result.json").is_file):
        print_err(
            f"{folder}: this run is finished, its result is in {folder / 'result.json'}; to train "
            f"longer, start another run from its weights: vitrail train --init {folder}"
        )
        return 0
    run = Run.resume(folder, settings)
    for notice in run.notices:
        print_err(notice)
    print_err(f"resuming at step {run.state.step:,}/{run.total_steps:,}")
    return follow(run)


def follow(run: Any) -> int:
    """Train to the end, or stop at a signal and save; print the progress."""
    from vitrail.cli.display import TrainingDisplay
    from vitrail.cli.signals import Stopped, stop_requests
    from vitrail.runtime import distributed

    _describe(run)
    startup = time.perf_counter() - STARTED
    try:
        with stop_requests() as stop:
            stopped = 0
            with TrainingDisplay(run, err) as display:
                for event in run.train(stopping=lambda: bool(stop.signal)):
                    display.show(event)
                    if stopped := distributed.highest(stop.signal):
                        break
            if stopped:
                run.save()
                raise Stopped(stopped)
            with stop.at_once():  # everything is saved; only the test and the plots are missing
                result = run.finish()
    except Stopped as reason:
        print_err(f"stopped and saved; resume with: vitrail train --resume {run.folder}")
        return 128 + reason.signal
    except OutputError as error:
        raise TrainingError(f"{error}; resume with: vitrail train --resume {run.folder}") from error
    except Exception as error:
        if run.saved is not None:
            error.add_note(f"resume with: vitrail train --resume {run.folder}")
        raise
    _conclude(run, result, startup)
    if problems := distributed.on_leader(lambda: run.problems):
        raise TrainingError(f"{'; '.join(problems)}; everything else is in {run.folder}/")
    return 0


def _describe(run: Any) -> None:
    """Print what is about to be trained."""
    from vitrail.runtime import distributed

    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    splits = ", ".join(f"{len(images):,} {name}" for name, images in run.monitored.items())
    data = run.config.data
    name = data.data_path if data.dataset == "folder" else data.dataset
    processes = f"{distributed.count()} processes on " if distributed.count() > 1 else ""
    print_err(
        f"{run.folder}: {parameters:,} parameters on {name}, "
        f"{run.train_images:,} training images{', ' if splits else ''}{splits}; "
        f"{processes}{run.device.type}, {run.precision}, "
        f"{'compiled' if run.compiled else 'not compiled'}"
    )


def _conclude(run: Any, result: dict[str, Any], startup: float) -> None:
    """Print the result, the seconds it took and what to try next."""
    goal = run.config.run.stop_at_accuracy
    if goal is not None:
        reached = run.is_enough()
        out.print(
            f"\nvalidation accuracy {goal:.2%} {'reached' if reached else 'not reached'} "
            f"in {result['seconds']:,.1f} s of training ({count(result['epochs'], 'epoch')})"
        )

    print_out(f"\n{run.folder}", style="bold")
    table = number_table("", "accuracy", "loss")
    for split in ("validation", "test"):
        if result[split]:
            table.add_row(split, f"{result[split]['accuracy']:.2%}", f"{result[split]['loss']:.4f}")
    if table.row_count:
        out.print(table)
    if not result["test"]:
        print_out("There is no test split, so there is no test score.")
    print_out(
        f"{count(result['epochs'], 'epoch')} ({result['petaflops']:.2g} PFLOP) "
        f"in {result['seconds']:,.0f} s of training "
        f"(plus {startup:,.1f} s of start-up and {result['evaluation_seconds']:,.0f} s of "
        f"evaluation), {result['images_per_second']:,.0f} images/s; "
        f"best epoch: {result['best_epoch']}; "
        f"curves, confusion matrix and checkpoints in {run.folder}/"
    )
    print_out(
        "\nTry next:\n"
        f"  vitrail test --model_path {run.folder}\n"
        f"  vitrail predict --model_path {run.folder} PICTURE\n"
        f"  vitrail explain --model_path {run.folder} PICTURE\n"
        f"  vitrail info {run.folder}"
    )


def _remove_if_unused(folder: Path) -> None:
    """Remove the folder of a run that did not start."""
    from vitrail.training.run_folder import is_unused

    if is_unused(folder):
        shutil.rmtree(folder)
