"""Fuzz every file reader, each target in a process that can be killed.

    PYTHONPATH=tools:$PYTHONPATH python -m fuzz --cases 20000 --json records/hostile/hostile.json

Prints a table: target, cases, refused, accepted, faults, slowest case, peak memory. The exit code
is 1 if there was a fault. Guided by coverage if atheris is installed, else by seeded mutation.
"""

import argparse
import importlib
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODULES = {
    "pictures": "pictures.TARGET",
    "pt": "weights.REFERENCE",
    "safetensors": "weights.SAFETENSORS",
    "foreign": "weights.FOREIGN",
    "checkpoints": "weights.CHECKPOINTS",
    "toml": "settings.TOML",
    "json": "settings.JSON",
    "classes": "names.CLASSES",
    "files": "names.FILES",
}
STUCK = 60.0
"""CPU seconds without a new case, or ten times as many of wall time, before a process is killed."""
LOST = 20
"""Number of processes of a target that may die before the target is abandoned."""
INSTRUMENTED = ["vitrail", "pickle", "tomllib", "zipfile", "json"]


def main() -> int:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="cases per target")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--targets", nargs="+", default=list(MODULES), choices=list(MODULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--engine", choices=["atheris", "seeded"])
    parser.add_argument("--keep", type=Path, help="folder for faulty cases")
    parser.add_argument("--replay", type=Path, help="run the single case in this file")
    parser.add_argument("--slot", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.engine = options.engine or ("atheris" if find_spec("atheris") else "seeded")
    if options.slot:
        return serve(options)
    if options.replay:
        return replay(options)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda name: run_target(name, options, Path(folder)), options.targets))
        if options.keep:
            roots = shutil.ignore_patterns("root*")
            shutil.copytree(folder, options.keep, dirs_exist_ok=True, ignore=roots)
    return report(rows, options, time.monotonic() - began)


def run_target(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run all cases of a target, with a new process after each case that kills one."""
    from fuzz.engine import LARGEST_CASE, SLOT

    slot, began, lost = scratch / f"{name}.slot", time.monotonic(), 0
    faults, log = slot.with_suffix(".faults"), slot.with_suffix(".log")
    faults.mkdir()
    slot.write_bytes(bytes(SLOT.size + LARGEST_CASE))
    while True:
        why = run_process(name, options, slot, log)
        content = slot.read_bytes()
        done, refused, accepted, broken, peak, length, slowest, spent = SLOT.unpack_from(content)
        if done >= options.cases or (done == 0 and length == 0) or lost >= LOST:
            break
        lost += 1
        (faults / f"killed-{lost:02}.case").write_bytes(content[SLOT.size : SLOT.size + length])
        (faults / f"killed-{lost:02}.txt").write_text(why)
        with slot.open("r+b") as file:
            file.write(SLOT.pack(done + 1, refused, accepted, broken + 1, peak, 0, slowest, spent))
    texts = [*sorted(faults.glob("*.txt")), *([log] if done < options.cases else [])]
    return {
        "target": name,
        "cases": done,
        "refused": refused,
        "accepted": accepted,
        "faults": broken,
        "slowest_seconds": round(slowest, 3),
        "peak_megabytes": round(peak / 1000),
        "processor_seconds": round(spent, 1),
        "seconds": round(time.monotonic() - began),
        "notes": [(text.read_text().strip().splitlines() or [""])[-1] for text in texts][:20],
    }


def run_process(name: str, options: argparse.Namespace, slot: Path, log: Path) -> str:
    """Run the process of a target; return why it ended."""
    command = [sys.executable, "-m", "fuzz", "--slot", str(slot), "--targets", name]
    command += ["--cases", str(options.cases), "--seed", str(options.seed)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with log.open("ab") as output:
        child = subprocess.Popen(
            [*command, "--engine", options.engine],
            stdout=output,
            stderr=output,
            env=os.environ | settings,
        )
    return wait(child, slot)


def wait(child: "subprocess.Popen[bytes]", slot: Path) -> str:
    """Wait for a process to end, or kill it if it hangs; return why it ended."""
    from fuzz.engine import SLOT

    done, seen, spent = -1, time.monotonic(), 0.0
    while child.poll() is None:
        time.sleep(0.2)
        with slot.open("rb") as file:
            now = SLOT.unpack(file.read(SLOT.size))[0]
        used = processor_seconds(child.pid)
        if now != done:
            done, seen, spent = now, time.monotonic(), used
        elif used - spent > STUCK or time.monotonic() - seen > 10 * STUCK:
            child.kill()
            child.wait()
            return f"did not end within {STUCK:.0f} s of CPU time: killed"
    code = child.returncode
    return f"the process died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def processor_seconds(pid: int) -> float:
    """Return the CPU time of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve(options: argparse.Namespace) -> int:
    """Run one target, in a child process."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("vitrail").setLevel(logging.ERROR)  # it warns about unofficial files
    if options.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=INSTRUMENTED):
            target = find_target(options.targets[0])
    else:
        target = find_target(options.targets[0])
    from fuzz.engine import Watch, fuzz

    root = options.slot.with_name(f"root-{options.slot.stem}")
    shutil.rmtree(root, ignore_errors=True)
    (root / "given").mkdir(parents=True)
    os.chdir(root / "given")
    watch = Watch(target, root, options.slot, cases=options.cases)
    fuzz(
        watch,
        [*target.seeds(), *target.large()],
        seed=options.seed,
        engine=options.engine,
        scratch=options.slot.with_suffix(".corpus"),
    )
    return 0


def find_target(name: str) -> Any:
    """Import a target."""
    module, _, attribute = MODULES[name].partition(".")
    return getattr(importlib.import_module(f"fuzz.{module}"), attribute)


def replay(options: argparse.Namespace) -> int:
    """Run one case without catching its exception."""
    from fuzz.engine import run_case

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "given").mkdir()
        data = options.replay.read_bytes()
        os.chdir(Path(folder) / "given")
        accepted = run_case(find_target(options.targets[0]), data, Path(folder))
        print("accepted" if accepted else "refused")
    return 0


def report(rows: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> int:
    """Print the table and write the JSON file; return the exit code."""
    from rich.console import Console
    from rich.table import Table

    from fuzz.engine import MEGABYTES, SECONDS

    for row in rows:
        if row["slowest_seconds"] > SECONDS:
            row["notes"].append(f"a case took more than {SECONDS} s")
        if row["peak_megabytes"] > MEGABYTES:
            row["faults"] += 1
            row["notes"].append(f"more than {MEGABYTES} MB of memory")
        if row["cases"] < options.cases:
            row["faults"] += 1
            row["notes"].append(f"only {row['cases']} of {options.cases} cases: see the log")
    table = Table(title=f"Hostile input, {options.engine}, {seconds:,.0f} s", title_justify="left")
    columns = [
        "target",
        "cases",
        "refused",
        "accepted",
        "faults",
        "slowest_seconds",
        "peak_megabytes",
    ]
    for column in columns:
        table.add_column(
            column.replace("_", " "), justify="left" if column == "target" else "right"
        )
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)
    for row in rows:
        for note in dict.fromkeys(row["notes"]):
            print(f"{row['target']}: {note!r:.300}")
    faults = sum(row["faults"] for row in rows)
    if options.json:
        names = (
            "torch",
            "numpy",
            "pillow",
            "safetensors",
            *(["atheris"] * (options.engine == "atheris")),
        )
        figures = {
            "engine": options.engine,
            "seed": options.seed,
            "seconds": round(seconds),
            "bounds": {"seconds_of_a_case": SECONDS, "megabytes": MEGABYTES},
            "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
            "faults": faults,
            "targets": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
