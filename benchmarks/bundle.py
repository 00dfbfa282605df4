"""Bundle a finished run's best model with the package: float16 weights, calibration and card.

python benchmarks/bundle.py RUN_FOLDER NAME RECORD_FOLDER [DATA_FOLDER]
"""

import dataclasses
import json
import sys
from pathlib import Path

from calibrate import calibrate
from vitrail.runtime.files import write_json
from vitrail.weights import bundled
from vitrail.weights.checkpoint import save_weights_file
from vitrail.weights.hub import without_paths
from vitrail.weights.pretrained import read

ALL_TOGETHER = 12 * 2**20
"""Maximum size of all bundled weights together."""


def main() -> None:
    run, name, record = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    source, result = read(run), json.loads((run / "result.json").read_text())
    info = dataclasses.replace(
        source.info, config=without_paths(source.info.config), numbers={}, metrics={}
    )
    half = {
        key: tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in source.weights.items()
    }
    save_weights_file(bundled.weights_path(name), info, half)
    config, validation = info.config, result["validation"]
    recipe = f"{run.name}, {result['epochs']} epochs, seed {config.run.seed}"
    card = bundled.Card(
        data=f"{config.data.dataset}, {result['train_images']:,} training images",
        recipe=recipe,
        test_accuracy=result["test"]["accuracy"],
        validation_accuracy=validation and validation["accuracy"],
        parameters=result["parameters"],
        record=record,
    )
    if validation:
        calibrate(name, Path(*sys.argv[4:5] or ["data"]))  # for the weights in float16
    write_json(bundled.FOLDER / f"{name}.json", dataclasses.asdict(card))
    size = sum(path.stat().st_size for path in bundled.FOLDER.iterdir())
    print(f"{bundled.weights_path(name)}: all bundled files together {size / 2**20:.2f} MiB")
    if size > ALL_TOGETHER:
        sys.exit("that is more than 12 MiB")


if __name__ == "__main__":
    main()
