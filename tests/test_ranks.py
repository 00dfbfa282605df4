"""Several processes of one run equal one process: two ranks, started once for all tests."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

import ranks_worker as worker
from vitrail.cli import main
from vitrail.config.files import from_json, read_json
from vitrail.errors import ConfigError
from vitrail.runtime import distributed
from vitrail.training.run import Run
from vitrail.weights.checkpoint import load_weights, read_pointer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that two ranks wrote (ranks_worker.py)."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        unused = str(free.getsockname()[1])
    # The test acts as torchrun's agent after a restart: its store still has a dead leader's port.
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent.set("vitrail/leader", unused)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, worker.__file__, str(folder), str(agent.port)]
    done = subprocess.run(command, env=environment, check=False, timeout=140)
    said = [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert done.returncode == 0, "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """The results of each rank."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same command line in one process."""
    folder = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.data.datasets.load_shapes", worker.few_shapes)
        patch.setattr("vitrail.training.run.plot_run", lambda *_: [])
        patch.chdir(folder)
        assert main([*worker.WORDS, "--folder_name", "single"]) == 0
    return folder / "output/single"


def test_the_shares_are_the_batch_without_loss_or_repeat(both: list[dict[str, Any]]) -> None:
    assert [rank["count"] for rank in both] == [2, 2]
    batches = worker.make_batches(worker.BASE, worker.noise(10, (8, 12), 5))
    sizes = []
    for step, parts in enumerate(zip(*(rank["shares"] for rank in both), strict=True)):
        sizes.append(tuple(len(part[0]) for part in parts))
        for batch, *shares in zip(batches(step), *parts, strict=True):
            assert torch.equal(batch, torch.cat(shares))
    assert sizes == [(2, 1), (2, 1), (2, 1), (1, 0)] * 2


def test_every_row_belongs_to_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for length, count, chunk in itertools.product([0, 1, 4, 23, 24], [1, 2, 3, 5, 8], [1, 3, 7]):
        monkeypatch.setattr(distributed, "count", lambda count=count: count)
        taken, sizes = [], []
        for rank in range(count):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            mine = list(range(length))[distributed.rows(length, chunk=chunk)]
            assert not mine or mine[0] % chunk == 0
            taken += mine
            sizes.append(-(-len(mine) // chunk))
        assert taken == list(range(length))
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", ["learned", "plain"])
def test_two_processes_learn_what_one_does(both: list[dict[str, Any]], name: str) -> None:
    training = {"optimizer": "adamw", "accumulate": 1, "clip_norm": 0.0} if name == "plain" else {}
    alone = worker.learn(worker.changed("training", **training))
    one, other = (rank[name] for rank in both)
    assert one["losses"] == other["losses"]
    assert one["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert one["correct"] == other["correct"] == alone["correct"]
    assert one["images"] == alone["images"] == [3, 3, 3, 1] * 3
    for gradient, wanted in zip(one["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert one["tensors"].keys() == alone["tensors"].keys()
    for tensor_name, tensor in alone["tensors"].items():
        assert torch.equal(one["tensors"][tensor_name], other["tensors"][tensor_name]), tensor_name
        torch.testing.assert_close(one["tensors"][tensor_name], tensor, rtol=1e-3, atol=2e-5)


def test_dropout_differs_between_ranks_and_the_weights_do_not(both: list[dict[str, Any]]) -> None:
    one, other = (rank["dropout"] for rank in both)
    assert one["dropped"][0].shape == other["dropped"][0].shape
    assert not torch.equal(one["dropped"][0], other["dropped"][0])
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, other["tensors"][name]), name
    draws = [*both[0]["draws"], *both[1]["draws"]]
    assert len(set(draws)) == 100


def test_running_statistics_are_the_mean_over_the_ranks(both: list[dict[str, Any]]) -> None:
    alone = worker.learn(
        worker.changed("training", batch_size=10, accumulate=1), 1, batch_norm=True
    )["tensors"]
    one, other = (rank["norm"]["tensors"] for rank in both)
    statistics = [name for name in one if "running" in name]
    assert len(statistics) == 4  # of the model and of its average
    for name in statistics:
        assert torch.equal(one[name], other[name]), name
        if "mean" in name:
            torch.testing.assert_close(one[name], alone[name], rtol=1e-4, atol=1e-6)
        else:  # spread within the shares, not between them
            torch.testing.assert_close(one[name], alone[name], rtol=0.3, atol=0.1)


def test_scores_are_shared_and_bit_identical(both: list[dict[str, Any]]) -> None:
    for number, batch_size in enumerate((3, 20)):
        alone = worker.scores(batch_size)
        for rank in both:
            assert torch.equal(rank["logits"][number], alone)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert rank["broken"]["error"].startswith("TrainingError: loss nan")
        assert "update 2: stopped before applying it" in rank["broken"]["error"]
        assert rank["broken"]["step"] == 1
    assert [rank["broken"]["same"] for rank in both] == [True, False]


def test_an_error_on_one_rank_is_raised_on_all(both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert rank["each"] == "DataError: process 1: no such file"
        assert rank["leader"] == "OutputError: disk full"
        assert rank["from leader"] == 0
        assert "batch_size is 1, but 2 processes share it" in rank["too small"]


def test_messages_between_ranks_arrive(both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert rank["highest"] == 15
        assert torch.equal(rank["copied"], torch.arange(6.0).view(2, 3).t())
        assert rank["seen"] is True
        assert rank["memory"] == [None, "output/mine"]


def test_the_command_writes_one_folder_as_one_process_would(folder: Path, single: Path) -> None:
    run = folder / "output/single"
    assert {p.name for p in run.iterdir()} == {p.name for p in single.iterdir()}
    assert sorted(p.name for p in (folder / "output").iterdir()) == ["single", "stopped"]
    assert read_json(run / "env.json")["processes"] == 2
    assert read_json(single / "env.json")["processes"] == 1
    curves = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, single)
    ]
    for row, wanted in zip(*curves, strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-4)
        assert row["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-4)
        assert row["train_accuracy"] == pytest.approx(wanted["train_accuracy"])
    test, wanted = (read_json(path / "result.json")["test"] for path in (run, single))
    assert test["images"] == wanted["images"] == 31
    assert test["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert len((run / "test_uses.jsonl").read_text().splitlines()) == 1


def test_all_ranks_evaluate_an_epoch_together(both: list[dict[str, Any]]) -> None:
    # 20 validation images in chunks of 4: ranks 0 and 1 in turn
    assert [rank["evaluated"] for rank in both] == [[12, 24], [8, 16]]


def test_one_rank_prints_and_all_have_the_same_exit_code(
    folder: Path, both: list[dict[str, Any]]
) -> None:
    leader, other = ((folder / f"{rank}.txt").read_text() for rank in (0, 1))
    assert [rank["codes"] for rank in both] == [[0, 2, 2, 2]] * 2
    assert other == ""
    assert "2 processes on cpu" in leader
    assert leader.count("unknown flag --bach_size (did you mean '--batch_size'?)") == 1
    assert leader.count("output/single already exists") == 1
    assert leader.count("batch_size is 1, but 2 processes share it") == 1
    assert "Traceback" not in leader


def test_a_signal_to_one_rank_stops_all_and_one_process_can_resume(
    folder: Path, both: list[dict[str, Any]], single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [rank["stopped"] for rank in both] == [143, 143]
    assert "vitrail train --resume output/stopped" in (folder / "0.txt").read_text()
    run = folder / "output/stopped"
    assert read_pointer(run / "checkpoints", "LAST").name == "step-0000005"
    monkeypatch.setattr("vitrail.data.datasets.load_shapes", worker.few_shapes)
    resumed = Run.resume(run, from_json(read_json(run / "config.json")))
    for _ in resumed.train():
        pass
    weights = load_weights(read_pointer(run / "checkpoints", "LAST"))
    for name, tensor in load_weights(read_pointer(single / "checkpoints", "LAST")).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_other_commands_take_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["info"]) == 2
    assert "vitrail info runs in one process: start it without torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        main(["info"])
    assert stop.value.code == 2


def test_unsuitable_gpus_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrail.runtime import hardware

    monkeypatch.setattr(distributed, "count", lambda: 3)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, words in (
        ("cuda", "process 3 of this machine has no GPU, there are only 2"),
        ("mps", "one process"),
    ):
        monkeypatch.setattr(
            hardware, "choose_device", lambda _, device=device: torch.device(device)
        )
        with pytest.raises(ConfigError, match=words):
            hardware.choose_own_device(device)
