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

import numpy as np
import pytest

from vitrail.cli import main
from vitrail.cli.sweep import _shown, summary, trial_table
from vitrail.cli.train import read
from vitrail.config.files import from_json
from vitrail.config.presets import get_preset
from vitrail.config.settings import Config
from vitrail.data.pictures import read_picture
from vitrail.errors import ConfigError, DataError
from vitrail.sweep import (
    Stopped,
    Sweep,
    apply,
    describe,
    flags,
    parse_space,
    ranked,
    suggest,
    write_csv,
)
from vitrail.training.loop import Update
from vitrail.training.run import EpochEnd, Run

TINY = shlex.split(
    "--patch_size 16 --embed_dim 8 --n_layers 1 --n_attention_heads 2 --batch_size 40 --epochs 2 "
    "--num_train_images 80 --validation_images 50 --device cpu --warmup_epochs 0"
)
SEARCH = ("learning_rate=1e-4..1e-2:log", "forward_mul=1,2")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("n_layers=4,6,8", ("CategoricalDistribution", {"choices": (4, 6, 8)})),
        ("n-layers=4,6", ("CategoricalDistribution", {"choices": (4, 6)})),
        ("label_smoothing=0,0.1", ("CategoricalDistribution", {"choices": (0.0, 0.1)})),
        ("pool=cls,mean", ("CategoricalDistribution", {"choices": ("cls", "mean")})),
        ("flip=random,none", ("CategoricalDistribution", {"choices": ("random", "none")})),
        ("fc_norm=true,False", ("CategoricalDistribution", {"choices": (True, False)})),
        ("warmup_epochs=none,1", ("CategoricalDistribution", {"choices": (None, 1.0)})),
        ("seed=1..3", ("IntDistribution", {"low": 1, "high": 3})),
        ("embed_dim=64..192:32", ("IntDistribution", {"low": 64, "high": 192, "step": 32})),
        (
            "learning_rate=1e-4..1e-2:log",
            ("FloatDistribution", {"low": 1e-4, "high": 1e-2, "log": True}),
        ),
        ("dropout=0..0.3:0.1", ("FloatDistribution", {"low": 0.0, "high": 0.3, "step": 0.1})),
    ],
)
def test_arguments_become_distributions_of_optuna(
    word: str, expected: tuple[str, dict[str, Any]]
) -> None:
    optuna = pytest.importorskip("optuna")
    kind, arguments = expected
    distribution = getattr(optuna.distributions, kind)(**arguments)
    name = word.partition("=")[0].replace("-", "_")
    assert parse_space([word]) == {name: distribution}
    trial = optuna.create_study().ask()
    value = suggest(trial, name, distribution)
    assert trial.params == {name: value}
    assert trial.distributions == {name: distribution}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to search"),
        ("n_layers", "give NAME=A,B,C or NAME=LOW..HIGH"),
        ("n_layer=1,2", "cannot search 'n_layer' (did you mean 'n_layers'?)"),
        ("--n-layers=4,6", "cannot search '__n_layers'"),
        ("n_layers=4", "at least two different values"),
        ("n_layers=4,4", "at least two different values"),
        ("n_layers=4,x", "n_layers is 'x': give a whole number"),
        ("n_layers=1.5..3", "--search n_layers=1.5..3: invalid literal for int()"),
        ("n_layers=3..1", "`low <= high` must hold"),
        ("learning_rate=a..1", "could not convert string to float: 'a'"),
        ("learning_rate=0..1:log", "`low > 0` must hold for `log=True`"),
        ("embed_dim=64..100:0", "`step > 0` must hold"),
        ("embed_dim=64..100:up", "invalid literal for int() with base 10: 'up'"),
        ("pool=1..2", "pool is not a number: give a list"),
        ("pool=cls,max", "pool is 'max': give 'cls', 'mean'"),
        ("dataset=shapes,cifar10", "cannot search 'dataset'"),
        ("n_layers=1,2 n_layers=3,4", "--search has n_layers twice"),
    ],
)
def test_invalid_arguments_are_refused(words: str, message: str) -> None:
    pytest.importorskip("optuna")
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
    start = from_json({"training": {"warmup_epochs": 2.0, "init": "x", "new_head": True}})
    changes = {"warmup_epochs": None, "new_head": False, "image_size": (32, 64), "mixup": 0.2}
    words = flags(start, apply(start, changes))
    assert words == "--image_size 32 64 --mixup 0.2 --warmup_epochs None --no-new_head"
    changed = flags(start, apply(start, {"class_token": True}))
    assert changed == "--class_token True"
    assert read(shlex.split(changed), "vitrail train")[1].model.class_token is True


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({}, {"trials": 0}, "trials is 0"),
        ({"data": {"validation_images": 0}}, {}, "give --validation_images"),
        ({"run": {"monitor": "test"}}, {}, "--monitor validation"),
        ({"run": {"folder_name": "a"}}, {}, "leave out --folder_name"),
        ({}, {"search": ("n_layer=1,2",)}, "cannot search"),
        ({}, {"storage": "nonsense://"}, "--storage: "),
    ],
)
def test_invalid_sweeps_write_nothing(
    changes: dict[str, Any], how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match=message):
        Sweep(from_json(changes), tmp_path / "s", **{"search": SEARCH, **how})
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


def test_trials_are_listed_completed_first_and_best_first(tmp_path: Path) -> None:
    all_trials = [
        fake_trial(0, "PRUNED", [0.9], n_layers=1),
        fake_trial(1, "COMPLETE", [0.2, 0.5, 0.4], n_layers=2),
        fake_trial(2, "WAITING", [], n_layers=3),
        fake_trial(3, "COMPLETE", [0.6, 0.7], n_layers=4),
        fake_trial(4, "FAIL", []),
    ]
    trials = ranked(SimpleNamespace(get_trials=lambda **_: all_trials))
    assert [(t["trial"], t["validation"], t["epochs"]) for t in trials] == [
        (3, 0.7, 2), (1, 0.5, 3), (0, 0.9, 1), (4, None, 0),
    ]  # fmt: skip
    assert summary(trials[0]) == "trial 3 complete after 2 epochs, validation 70.00%: n_layers 4"
    assert trial_table(trials).row_count == 4
    assert trial_table([]).row_count == 0
    write_csv(trials, tmp_path / "trials.csv")
    rows = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
    assert [row["n_layers"] for row in rows] == ["4", "2", "1", ""]
    assert [row["validation"] for row in rows] == ["0.7", "0.5", "0.9", ""]


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three trials; one is invalid, one interrupted and queued again."""
    pytest.importorskip("optuna")
    return tmp_path_factory.mktemp("sweeps") / "s"


def scripted(run: Run) -> Iterator[Any]:
    """End each epoch at once, with an accuracy that grows with the learning rate."""
    for epoch in (1, 2):
        accuracy = min(1.0, run.config.training.learning_rate * 50 + epoch / 100)
        step = run.state.step = epoch * run.batches.steps_per_epoch
        run.rows.append({"epoch": epoch, "step": step, "validation_accuracy": accuracy})  # type: ignore[typeddict-item]
        yield EpochEnd(run.rows[-1], True)


def test_an_epoch_whose_end_was_not_shown_counts(study_folder: Path, tiny_run: Config) -> None:
    def interrupted(run: Run) -> Iterator[Any]:
        for event in run.train():
            yield event
            if isinstance(event, Update) and event.step == run.total_steps:
                return

    sweep = Sweep(
        from_json({"training": {"epochs": 1}}, tiny_run), study_folder.with_name("cut"),
        search=SEARCH, trials=1, events=interrupted,
    )  # fmt: skip
    (trial,) = sweep.run()
    rows = (Path(trial.user_attrs["folder"]) / "metrics.jsonl").read_text()
    assert trial.state.name == "COMPLETE"
    assert trial.value == json.loads(rows)["validation_accuracy"] > 0


def test_trials_that_reach_the_goal_are_complete(study_folder: Path, tiny_run: Config) -> None:
    base = from_json({"training": {"epochs": 2}, "run": {"stop_at_accuracy": 0.0}}, tiny_run)
    sweep = Sweep(base, study_folder.with_name("goal"), search=SEARCH, trials=1)
    (trial,) = sweep.run()
    assert trial.state.name == "COMPLETE"
    assert describe(trial)["epochs"] == 1


def test_a_signal_ends_a_sweep_after_the_epoch_that_is_evaluated(
    tmp_path: Path, tiny_run: Config
) -> None:
    (tmp_path / "a").mkdir()
    run = Run.start(tiny_run, tmp_path / "a")
    stop = SimpleNamespace(signal=0)
    events = []
    for event in _shown(run, stop):  # type: ignore[arg-type]
        events.append(event)
        if run.rows:
            stop.signal = 2
    assert isinstance(events[-1], EpochEnd)
    assert len(run.rows) == 1


def test_a_study_ends_with_the_requested_number_of_trials(
    study_folder: Path, tiny_run: Config
) -> None:
    base = from_json({"training": {"epochs": 2}}, tiny_run)
    how: Any = {"search": (SEARCH[0], "n_attention_heads=3,5"), "trials": 6, "pruner": "none"}

    def cut_short(run: Run) -> Iterator[Any]:
        yield next(scripted(run))

    # The first part is stopped in the middle of a trial: the next takes it up again.
    with pytest.raises(Stopped):
        list(Sweep(base, study_folder, **how, events=cut_short).run())
    sweep = Sweep(base, study_folder, **how, events=scripted)
    trials = list(sweep.run())
    states = [trial.state.name for trial in trials]
    assert len(trials) == states.count("COMPLETE") + states.count("PRUNED") == 6
    assert trials[0].params == sweep.study.trials[0].params
    # embed_dim 12 has no 5 heads: a pruned trial, not the end.
    bad = [describe(trial) for trial in trials if trial.params["n_attention_heads"] == 5]
    assert bad
    assert all("embed_dim 12 is not a multiple" in each["error"] for each in bad)
    assert not any(each["folder"] for each in bad)
    for trial in trials:
        if trial.state.name == "COMPLETE":
            rate = trial.params["learning_rate"]
            assert trial.value == pytest.approx(min(1, rate * 50 + 0.02))
            config = json.loads((Path(trial.user_attrs["folder"]) / "config.json").read_text())
            assert config["training"]["learning_rate"] == rate
    assert list(Sweep(base, study_folder, **how, events=scripted).run()) == []


def test_one_process_draws_the_same_trials_again(study_folder: Path, tiny_run: Config) -> None:
    base = from_json({"training": {"epochs": 2}}, tiny_run)
    drawn = []
    for name in ("same-1", "same-2"):
        sweep = Sweep(
            base, study_folder.with_name(name), search=SEARCH[:1], trials=2, events=scripted
        )
        drawn.append([trial.params["learning_rate"] for trial in sweep.run()])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_a_study_with_other_settings_is_not_joined(study_folder: Path, tiny_run: Config) -> None:
    folder = study_folder.with_name("mine")
    Sweep(tiny_run, folder, search=SEARCH)
    moved = from_json({"data": {"data_path": "elsewhere"}}, tiny_run)
    Sweep(moved, folder, search=SEARCH[::-1], trials=3)  # the same in another order
    other = from_json({"training": {"batch_size": 41}}, tiny_run)
    for base, search, name in (
        (other, SEARCH, "batch_size"),
        (tiny_run, SEARCH[:1], "--search forward_mul=1,2"),
    ):
        with pytest.raises(ConfigError, match=f"has different settings: {name}: give the same"):
            Sweep(base, folder, search=search)


def test_a_sweep_without_a_completed_trial_shows_the_reasons_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    words = ["sweep", "--search", "n_attention_heads=3,5", *TINY, "--output_path", str(tmp_path)]
    assert main([*words, "--trials", "2"]) == 1
    shown = capsys.readouterr()
    table = " ".join(shown.out.split())
    assert "error" in table
    assert "embed_dim" in table
    assert "n_attention_heads" in table
    assert shown.err.splitlines()[-1].startswith("vitrail: no trial completed")
    assert main([*words, "--trials", "2", "--json"]) == 1
    trials = json.loads(capsys.readouterr().out)
    assert [trial["n_attention_heads"] for trial in trials] in ([3, 5], [5, 3], [3, 3], [5, 5])


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
    sweep = Sweep(tiny_run, tmp_path / "few", search=SEARCH, trials=2)
    with pytest.raises(DataError, match="compares trials on validation images, but there are none"):
        list(sweep.run())


@pytest.mark.parametrize(
    "words", ["--init cifar10-vit --new_head", "--dataset npz --data_path gray.npz"]
)
def test_a_sweep_has_the_settings_of_the_command_that_it_recommends(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("gray.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    found = []
    monkeypatch.setattr("vitrail.cli.sweep._run", lambda _, settings, *__: found.append(settings))
    monkeypatch.setattr("vitrail.cli.sweep._conclude", lambda *_: 1)
    assert main(["sweep", *words.split(), "--search", "seed=1,2"]) == 0
    assert found == [read(words.split(), "vitrail train")[1]]
    assert found[0].model != get_preset("quick").model


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
        running = [trial for trial in read_trials(folder) if trial.state.name == "RUNNING"]
        if len(running) == 2 and all(trial.params for trial in running):  # else nothing to repeat
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
