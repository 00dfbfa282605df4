"""Faults put into runs on purpose, each a few times; ``make faults`` tries them many times."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import damage, disk, kills, not_finite, stops
from faults.tally import Tally
from vitrail.config.settings import Config

children = pytest.mark.xdist_group("children")
"""All in one worker: they share the process that they are forked from."""


EPOCHS = 4
"""All runs have the same length, so they are compared with one undisturbed run."""
SEED = 3
"""With it, two interrupted processes do not finish the run."""


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users can enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    yield folder
    shutil.rmtree(folder)


def require_nothing_lost(tally: Tally, tried: int) -> None:
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert tally.lost == []
    assert tally.tried == tried


@children
def test_killed_at_random_moments(tmp_path: Path) -> None:
    require_nothing_lost(kills.storm(tmp_path, kills=2, epochs=EPOCHS, seed=SEED), 3)


@children
def test_killed_at_some_writes(tmp_path: Path) -> None:
    require_nothing_lost(kills.every_point(tmp_path, epochs=EPOCHS, only=1), 1)


@children
def test_asked_to_stop(tmp_path: Path) -> None:
    require_nothing_lost(stops.asked(tmp_path, times=2, epochs=EPOCHS, seed=SEED), 3)


@children
def test_asked_twice(tmp_path: Path) -> None:
    require_nothing_lost(stops.twice(tmp_path, times=1, epochs=EPOCHS), 1)


@children
def test_stopped_before_the_first_update(tmp_path: Path) -> None:
    require_nothing_lost(stops.early(tmp_path, times=1, epochs=EPOCHS), 1)


@children
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    require_nothing_lost(stops.two_runs(tmp_path, times=1, epochs=EPOCHS), 1)
    require_nothing_lost(stops.race(tmp_path / "race", times=1, epochs=EPOCHS), 1)


@children
def test_a_disk_that_fails(tmp_path: Path) -> None:
    require_nothing_lost(disk.every_error(tmp_path, epochs=EPOCHS, only=1), 1)


@children
def test_folders_that_are_not_flushed(tmp_path: Path) -> None:
    require_nothing_lost(disk.folders_not_flushed(tmp_path, epochs=EPOCHS), 4)


@children
def test_a_full_disk(tmp_path: Path) -> None:
    require_nothing_lost(disk.full_disk(tmp_path, sizes=1, epochs=EPOCHS), 1)


@children
@pytest.mark.skipif(os.name != "posix", reason="rights are those of POSIX")
def test_a_folder_that_becomes_read_only(open_path: Path) -> None:
    require_nothing_lost(disk.read_only(open_path, times=1, epochs=EPOCHS), 1)


@children
def test_a_folder_that_is_removed(tmp_path: Path) -> None:
    require_nothing_lost(disk.removed(tmp_path, times=1, epochs=EPOCHS), 1)


@children
def test_a_clock_that_jumps(tmp_path: Path) -> None:
    require_nothing_lost(disk.clock(tmp_path, times=1), 1)


def test_damaged_checkpoints(tiny_run: Config, tmp_path: Path) -> None:
    require_nothing_lost(damage.mutations(tmp_path, tiny_run, times=16, ends=1), 16)


def test_values_that_are_not_finite(tiny_run: Config, tmp_path: Path) -> None:
    tally = not_finite.injected(tmp_path, tiny_run, every=11)
    assert tally.lost == []
    assert tally.tried > 12
