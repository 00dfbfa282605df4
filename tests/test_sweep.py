"""Sweeps: arguments, errors, and studies shared by several processes."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vitrail.cli import main
from vitrail.config.files import from_json
from vitrail.config.settings import Config
from vitrail.data.pictures import read_picture
from vitrail.errors import ConfigError, DataError
from vitrail.sweep.report import Outcome, flags, outcomes, trial_table
from vitrail.sweep.space import apply, parse_dimension, parse_space
from vitrail.sweep.study import Stopped, Sweep, SweepSettings
from vitrail.training.run import EpochEnd, Run

TINY = shlex.split(
    "--patch_size 16 --embed_dim 8 --n_layers 1 --n_attention_heads 2 --batch_size 40 --epochs 2 "
    "--num_train_images 80 --validation_images 50 --device cpu --warmup_epochs 0"
)
SEARCH = ("learning_rate=1e-4..1e-2:log", "forward_mul=1,2")


class Asked:
    """Mock of an optuna trial: records the calls, and returns the last possible value."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def suggest_categorical(self, name: str, values: tuple[Any, ...]) -> Any:
        self.calls.append((name, values))
        return values[-1]

    def suggest_int(self, name: str, low: int, high: int, **how: Any) -> int:
        self.calls.append((name, low, high, how))
        return high

    suggest_float: Any = suggest_int


@pytest.mark.parametrize(
    ("word", "call"),
    [
        ("n_layers=4,6,8", ("n_layers", (4, 6, 8))),
        ("--n-layers=4,6", None),
        ("n-layers=4,6", ("n_layers", (4, 6))),
        ("label_smoothing=0,0.1", ("label_smoothing", (0.0, 0.1))),
        ("pool=cls,mean", ("pool", ("cls", "mean"))),
        ("flip=true,False", ("flip", (True, False))),
        ("warmup_epochs=none,1", ("warmup_epochs", (None, 1.0))),
        ("seed=1..3", ("seed", 1, 3, {"log": False, "step": 1})),
        ("embed_dim=64..192:32", ("embed_dim", 64, 192, {"log": False, "step": 32})),
        (
            "learning_rate=1e-4..1e-2:log",
            ("learning_rate", 1e-4, 1e-2, {"log": True, "step": None}),
        ),
        ("dropout=0..0.3:0.1", ("dropout", 0.0, 0.3, {"log": False, "step": 0.1})),
    ],
)
def test_arguments_become_calls_of_optuna(word: str, call: tuple[Any, ...] | None) -> None:
    if call is None:
        with pytest.raises(ConfigError, match="unknown setting"):
            parse_dimension(word)
        return
    trial = Asked()
    value = parse_dimension(word).suggest(trial)
    assert trial.calls == [call]
    assert type(value) is type(call[1][-1] if isinstance(call[1], tuple) else call[2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to search"),
        ("n_layers", "give NAME=A,B,C or NAME=LOW..HIGH"),
        ("n_layer=1,2", "unknown setting 'n_layer' (did you mean 'n_layers'?)"),
        ("n_layers=4", "at least two different values"),
        ("n_layers=4,4", "at least two different values"),
        ("n_layers=4,x", "n_layers is 'x': give a whole number"),
        ("n_layers=1.5..3", "n_layers takes whole numbers"),
        ("n_layers=3..1", "3 is not below 1"),
        ("n_layers=a..1", "'a' is not a number"),
        ("learning_rate=0..1:log", "a log range must start above 0"),
        ("learning_rate=1e-3..inf", "'inf' is not a number"),
        ("embed_dim=64..100:32", "from 64 to 100 is not a multiple of 32"),
        ("embed_dim=64..100:0", "is not a multiple of 0"),
        ("embed_dim=64..100:up", "'up' is not a number"),
        ("pool=1..2", "pool is not a number: give a list"),
        ("pool=cls,max", "pool is 'max': give 'cls', 'mean'"),
        ("dataset=shapes,cifar10", "dataset must be the same in all trials"),
        ("device=cpu,cuda", "device must be the same in all trials"),
        ("n_layers=1,2 n_layers=3,4", "--search has n_layers twice"),
    ],
)
def test_invalid_arguments_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_space(words.split())


def test_a_trial_overrides_only_its_own_settings() -> None:
    base = from_json({"training": {"epochs": 7}})
    config = apply(base, {"n_layers": 3, "learning_rate": 0.5, "mixup": 1})
    changed = {n: v for n, v in config.flat().items() if v != base.flat()[n]}
    assert changed == {"n_layers": 3, "learning_rate": 0.5, "mixup": 1.0}
    with pytest.raises(ConfigError, match="embed_dim 128 is not a multiple"):
        apply(base, {"n_attention_heads": 3})


def test_flags_reproduce_the_difference_of_two_configurations() -> None:
    changes = {"warmup_epochs": None, "flip": False, "image_size": (32, 64), "mixup": 0.2}
    start = from_json({"training": {"warmup_epochs": 2.0}})
    words = flags(start, apply(start, changes))
    assert words == "--image_size 32 64 --no-flip --mixup 0.2 --warmup_epochs None"


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({}, {"trials": 0}, "trials is 0"),
        ({"data": {"validation_images": 0}}, {}, "a sweep compares trials on validation images"),
        ({"run": {"monitor": "test"}}, {}, "give --monitor validation"),
        ({"run": {"folder_name": "a"}}, {}, "leave out --folder_name"),
        ({}, {"search": ("n_layer=1,2",)}, "unknown setting"),
        ({}, {"storage": "nonsense://"}, "--storage: "),
    ],
)
def test_invalid_sweeps_write_nothing(
    changes: dict[str, Any], how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match=message):
        Sweep(from_json(changes), SweepSettings(**{"search": SEARCH, **how}), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--study_name a/b --num_train_images 7", "study_name is 'a/b': give a plain name"),
        ("--trial 3", "unknown flag --trial"),
    ],
)
def test_invalid_flags_are_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    assert main(["sweep", "--search", *SEARCH, *words.split()]) == 2
    assert message in capsys.readouterr().err


def fake_trial(number: int, state: str, accuracies: list[float], **params: Any) -> Any:
    """What optuna's FrozenTrial is, as far as reports read it."""
    return SimpleNamespace(
        number=number,
        state=SimpleNamespace(name=state),
        intermediate_values=dict(enumerate(accuracies, 1)),
        params=params,
        user_attrs={"folder": f"f{number}"},
    )


def test_trials_are_listed_completed_first_and_best_first() -> None:
    all_trials = [
        fake_trial(0, "PRUNED", [0.9], n_layers=1),
        fake_trial(1, "COMPLETE", [0.2, 0.5, 0.4], n_layers=2),
        fake_trial(2, "WAITING", [], n_layers=3),
        fake_trial(3, "COMPLETE", [0.6, 0.7], n_layers=4),
        fake_trial(4, "FAIL", []),
    ]
    printed = outcomes(SimpleNamespace(get_trials=lambda **_: all_trials))
    assert [(o.number, o.accuracy, o.epochs) for o in printed] == [
        (3, 0.7, 2), (1, 0.5, 3), (0, 0.9, 1), (4, None, 0),
    ]  # fmt: skip
    assert printed[0].line() == "trial 3 complete after 2 epochs, validation 70.00%: n_layers 4"
    assert trial_table(printed).row_count == 4


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three trials; one is invalid, one interrupted and queued again."""
    pytest.importorskip("optuna")
    return tmp_path_factory.mktemp("sweeps") / "s"


def scripted(run: Run) -> Iterator[Any]:
    """End each epoch at once, with an accuracy that grows with the learning rate."""
    for epoch in (1, 2):
        accuracy = min(1.0, run.config.training.learning_rate * 50 + epoch / 100)
        run.state.step = epoch * run.batches.steps_per_epoch
        yield EpochEnd({"epoch": epoch, "validation_accuracy": accuracy}, True)


def test_a_study_ends_with_the_requested_number_of_trials(
    study_folder: Path, tiny_run: Config
) -> None:
    base = from_json({"training": {"epochs": 2}}, tiny_run)
    how = SweepSettings((SEARCH[0], "n_attention_heads=3,5"), trials=6, pruner="none")

    def cut_short(run: Run) -> Iterator[Any]:
        yield next(scripted(run))

    # The first part is stopped in the middle of a trial: the next takes it up again.
    with pytest.raises(Stopped):
        list(Sweep(base, how, study_folder, events=cut_short).run())
    sweep = Sweep(base, how, study_folder, events=scripted)
    trials = list(sweep.run())
    states = [trial.state.name for trial in trials]
    assert len(trials) == states.count("COMPLETE") + states.count("PRUNED") == 6
    assert trials[0].params == sweep.study.trials[0].params
    # embed_dim 12 has no 5 heads: a pruned trial, not the end.
    bad = [Outcome.of(trial) for trial in trials if trial.params["n_attention_heads"] == 5]
    assert bad
    assert all("embed_dim 12 is not a multiple" in each.error for each in bad)
    assert not any(each.folder for each in bad)
    for trial in trials:
        if trial.state.name == "COMPLETE":
            rate = trial.params["learning_rate"]
            assert trial.value == pytest.approx(min(1, rate * 50 + 0.02))
            config = json.loads((Path(trial.user_attrs["folder"]) / "config.json").read_text())
            assert config["training"]["learning_rate"] == rate
    assert list(Sweep(base, how, study_folder, events=scripted).run()) == []


def test_one_process_draws_the_same_trials_again(study_folder: Path, tiny_run: Config) -> None:
    base = from_json({"training": {"epochs": 2}}, tiny_run)
    how = SweepSettings((SEARCH[0],), trials=2)
    drawn = []
    for name in ("same-1", "same-2"):
        sweep = Sweep(base, how, study_folder.with_name(name), events=scripted)
        drawn.append([trial.params["learning_rate"] for trial in sweep.run()])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_a_trial_killed_before_its_first_heartbeat_is_not_waited_for(
    study_folder: Path, tiny_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.sweep.study.POLL_SECONDS", 0.2)
    base = from_json({"training": {"epochs": 2}}, tiny_run)
    how = SweepSettings((SEARCH[0],), trials=1)
    sweep = Sweep(base, how, study_folder.with_name("killed"), events=scripted)
    with pytest.warns(UserWarning, match="Heartbeat"):
        sweep.study.ask()
    events = sweep.run()
    assert next(events) is None, "at first it may belong to another live process"
    monkeypatch.setattr("vitrail.sweep.study.GRACE_SECONDS", 0)
    printed = list(events)
    assert [trial.state.name for trial in sweep.study.trials] == ["FAIL", "COMPLETE"]
    assert [trial.number for trial in printed] == [1]


def test_a_study_with_other_settings_is_not_joined(study_folder: Path, tiny_run: Config) -> None:
    folder = study_folder.with_name("mine")
    Sweep(tiny_run, SweepSettings(SEARCH), folder)
    moved = from_json({"data": {"data_path": "elsewhere"}}, tiny_run)
    Sweep(moved, SweepSettings(SEARCH[::-1], trials=3), folder)  # the same in another order
    other = from_json({"training": {"batch_size": 41}}, tiny_run)
    for base, search, name in (
        (other, SEARCH, "batch_size"),
        (tiny_run, SEARCH[:1], "--search forward_mul=1,2"),
    ):
        with pytest.raises(ConfigError, match=f"has other settings: {name}: give the same"):
            Sweep(base, SweepSettings(search), folder)


def test_a_sweep_without_a_completed_trial_shows_the_reasons_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    words = ["sweep", "--search", "n_attention_heads=3,5", *TINY, "--output_path", str(tmp_path)]
    assert main([*words, "--trials", "2"]) == 1
    shown = capsys.readouterr()
    table = " ".join(shown.out.split())
    assert "reason" in table
    assert "embed_dim" in table
    assert "n_attention_heads" in table
    assert shown.err.splitlines()[-1].startswith("vitrail: no trial completed")


def test_a_sweep_on_too_few_images_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    words = ["sweep", "--search", "learning_rate=1e-3,1e-2", *TINY, "--output_path", str(tmp_path)]
    few = ["--num_train_images", "9", "--validation_images", "None"]
    assert main([*words, *few]) == 2
    assert "these training images are too few to hold any out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_trial_whose_data_has_no_validation_images_ends_the_sweep(
    tmp_path: Path, tiny_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    real = Run.start

    def without(config: Config, folder: Path) -> Run:
        run = real(config, folder)
        run.monitored.pop("validation")
        return run

    monkeypatch.setattr(Run, "start", without)
    sweep = Sweep(tiny_run, SweepSettings(SEARCH, trials=2), tmp_path / "few")
    with pytest.raises(DataError, match="these training images are too few to hold any out"):
        list(sweep.run())


def test_flags_to_try_next_can_be_pasted_into_a_shell() -> None:
    start = Config()
    best = from_json({"data": {"data_path": "my pictures"}, "training": {"epochs": 7}})
    text = flags(start, best)
    assert shlex.split(text) == ["--data_path", "my pictures", "--epochs", "7"]


def start(folder: Path) -> subprocess.Popen[str]:
    """Start one process of a sweep of eight short trials."""
    words = ["sweep", "--search", *SEARCH, "--trials", "8", "--output_path", str(folder)]
    slower = ["--num_train_images", "500", "--epochs", "6"]
    return subprocess.Popen(
        [sys.executable, "-m", "vitrail", *words, *TINY, *slower, "--study_name", "s"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )  # fmt: skip


def read_trials(folder: Path) -> list[Any]:
    """Return the trials of the study, or none while it cannot be read."""
    import optuna

    if not (folder / "study.db").exists():
        return []
    try:
        study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'study.db'}")
        return list(study.trials)
    except Exception:  # noqa: BLE001 (its tables are being made, or locked)
        return []


def kill_in_a_trial(doomed: subprocess.Popen[str], folder: Path) -> None:
    """Kill a process while both have a running trial; it is stopped while one looks."""
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline:
        doomed.send_signal(signal.SIGSTOP)
        if [trial.state.name for trial in read_trials(folder)].count("RUNNING") == 2:
            doomed.kill()
            return
        doomed.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    pytest.fail("the two processes never had a trial each")


@pytest.mark.slow
def test_two_processes_share_a_study_and_one_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    doomed, other = start(tmp_path), start(tmp_path)
    try:
        kill_in_a_trial(doomed, tmp_path / "s")
        out, err = other.communicate(timeout=1700)
    finally:
        doomed.kill()
        other.kill()
        doomed.communicate()
    assert other.returncode == 0, err
    trials = read_trials(tmp_path / "s")
    states = [trial.state.name for trial in trials]
    assert states.count("COMPLETE") + states.count("PRUNED") == 8
    assert states.count("FAIL") == 1, "the killed process is detected"
    assert len(states) == 9
    (dead,) = [trial for trial in trials if trial.state.name == "FAIL"]
    again = [trial for trial in trials if trial.params == dead.params and trial is not dead]
    assert again, "and its trial is run again"
    rows = list(csv.DictReader((tmp_path / "s/trials.csv").read_text().splitlines()))
    assert len(rows) == 9
    assert read_picture(tmp_path / "s/importance.png").std() > 5
    assert "learning_rate" in out
    assert "Try next" in out
