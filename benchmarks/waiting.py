"""Training speed, alone and next to a busy process, by how long OpenMP's threads spin.

    python benchmarks/waiting.py --rounds 5 --spins 300000 30000 10000 1000
    python benchmarks/waiting.py --rounds 5 --package /path/to/another/checkout/src

Every round trains `quick` for two short epochs once per setting, in turns: on the idle machine, and
next to one process that multiplies matrices. `chosen` is the setting that the commands use;
300000 is the default of GNU's OpenMP. The other checkout is measured with its own setting.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BUSY = """
import os
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy as np
matrix = np.random.rand(400, 400)
while True:
    matrix @ matrix
"""
TRAIN = ["train", "--preset", "quick", "--epochs", "2", "--num_train_images", "5000"]


def train(environment: dict[str, str], package: str) -> float:
    """Return the images per second of one training run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", package, *TRAIN]
        command += ["--output_path", folder, "--folder_name", "run"]
        env = {**os.environ, **environment}
        subprocess.run(command, env=env, check=True, capture_output=True)
        result = json.loads((Path(folder) / "run/result.json").read_text(encoding="utf-8"))
    return float(result["images_per_second"])


def main() -> None:
    """Measure in turns and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="training runs of each kind")
    parser.add_argument("--spins", nargs="*", default=[], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--package", type=Path, help="src folder of another checkout")
    options = parser.parse_args()
    kinds: dict[str, tuple[dict[str, str], str]] = {"chosen": ({}, "vitrail")}
    kinds |= {f"spin {n}": ({"GOMP_SPINCOUNT": n}, "vitrail") for n in options.spins}
    if options.package:
        (package,) = (path.parent.name for path in options.package.glob("*/__init__.py"))
        kinds["other checkout"] = ({"PYTHONPATH": str(options.package)}, package)
    rows: dict[str, list[float]] = {f"{w}, {k}": [] for w in ("idle", "busy") for k in kinds}
    for _ in range(options.rounds):
        for name, kind in kinds.items():
            rows[f"idle, {name}"].append(train(*kind))
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            for name, kind in kinds.items():
                rows[f"busy, {name}"].append(train(*kind))
        finally:
            busy.kill()
            busy.wait()
    print(json.dumps({"images_per_second": rows}))
    for name, values in rows.items():
        median = statistics.median(values)
        print(f"{name:24} {median:7.0f} ({min(values):.0f} to {max(values):.0f})", file=sys.stderr)


if __name__ == "__main__":
    main()
