"""Speed of training, data and augmentation included, for presets in both number formats.

    python benchmarks/step.py --presets quick seed --rounds 5 --steps 3

float32 and bfloat16 take turns; the first row is what the others are held against.
"""

import tyro
from timing import interleave, report, training

from vitrine.configfile import from_json
from vitrine.presets import get_preset


def main(presets: tuple[str, ...] = ("seed", "quick"), rounds: int = 5, steps: int = 3) -> None:
    """Time presets on the drawn shapes (the pixels do not change the speed).

    Args:
        presets: names of presets.
        rounds: rounds that count, after one that does not.
        steps: updates in a round.
    """
    contestants = {}
    for name in presets:
        for precision in ("float32", "bfloat16"):
            changes = {
                "data": {"dataset": "shapes"},
                "training": {"precision": precision},
                "run": {"monitor": "validation"},
            }
            config = from_json(changes, get_preset(name))
            contestants[f"{name}, {precision}"] = training(config, steps)
    speeds = interleave(contestants, rounds=rounds)
    report("Training, augmentation included", speeds, steps=steps)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
