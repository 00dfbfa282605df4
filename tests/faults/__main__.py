"""The long form: every fault many times, one table. Run by ``make faults``.

PYTHONPATH=tests python -m faults [--record records/faults]
"""

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.table import Table

from faults.long_form import all_faults, attempt
from faults.tally import Tally
from vitrail.runtime.hardware import package_versions, processor_name

WORKERS = 2
"""Faults tried at the same time, each in a process of its own."""
COMMAND = "make faults"


def main() -> int:
    """Try everything; print the table; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--record", type=Path, help="also write README.md and faults.json there")
    options = parser.parse_args()
    console, began = Console(stderr=True), time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(WORKERS, mp_context=context) as pool,
    ):
        Path(name).chmod(0o755)  # one fault runs as another user
        jobs = [pool.submit(attempt, n, Path(name)) for n in range(len(all_faults()))]
        for job in as_completed(jobs):
            tally, _ = job.result()
            console.print(f"{tally.fault}: {tally.survived} of {tally.tried} {tally.skipped}")
            for lost in tally.lost[:5]:
                console.print(f"  lost: {lost}", markup=False)
        rows = [job.result() for job in jobs]
    seconds = time.monotonic() - began
    Console(width=110).print(table(rows))
    print(f"{seconds / 60:.1f} minutes")
    if options.record:
        write_record(options.record, rows, seconds)
    return 1 if any(tally.lost for tally, _ in rows) else 0


def table(rows: list[tuple[Tally, float]]) -> Table:
    """Return the figures as one table."""
    drawn = Table("fault", show_edge=False, pad_edge=False)
    for column in ("tried", "survived", "lost", "seconds"):
        drawn.add_column(column, justify="right")
    for tally, seconds in rows:
        name = f"{tally.fault} (not tried: {tally.skipped})" if tally.skipped else tally.fault
        figures = (tally.tried, tally.survived, len(tally.lost), f"{seconds:.0f}")
        drawn.add_row(name, *map(str, figures))
    return drawn


def write_record(folder: Path, rows: list[tuple[Tally, float]], seconds: float) -> None:
    """Write the table with its command, commit and versions."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = package_versions()
    machine = f"{platform.system()} {platform.machine()}, {processor_name()}"
    faults = [
        {
            "fault": tally.fault, "tried": tally.tried, "survived": tally.survived,
            "lost": tally.lost, "skipped": tally.skipped, "seconds": round(spent, 1),
        }
        for tally, spent in rows
    ]  # fmt: skip
    record = {
        "command": COMMAND, "commit": commit, "versions": versions, "machine": machine,
        "minutes": round(seconds / 60, 1), "faults": faults,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        f"| {t.fault}{f' (not tried: {t.skipped})' if t.skipped else ''} "
        f"| {t.tried} | {t.survived} | {len(t.lost)} |"
        for t, _ in rows
    ]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = README.format(
        commit=commit, versions=names, machine=machine, minutes=seconds / 60, table="\n".join(lines)
    )
    (folder / "README.md").write_text(text)


README = """\
# Fault injection

**Claim.** No saved data are lost, and no corrupt model is loaded, under any injected fault.

    make faults        # python -m faults --record records/faults writes this folder

Commit {commit}; {versions}. {machine}; {minutes:.1f} minutes.

| fault | tried | survived | lost |
|---|---|---|---|
{table}

A run survives a fault if every checkpoint on disk is complete and correct, and the resumed run ends
with weights, moving average, optimizer state, losses of all updates, metrics, best epoch and test
scores bit-for-bit equal to those of an undisturbed run. (A run whose folder was removed has lost
its earlier epochs; there, losses and state are compared.) The faults are in `tests/faults/`.
"""

if __name__ == "__main__":
    sys.exit(main())
