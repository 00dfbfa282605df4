"""The share of pictures of other kinds that a model reports as unlike its training images.

python benchmarks/unlike.py MODEL [DATA_FOLDER]     needs scikit-learn and scikit-image

Compares familiarity with the energy of the logits (Liu et al. 2020, arXiv:2010.03759): for both,
the area under the ROC curve against test images, and the share below the fifth percentile of the
validation images.
"""

import json
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import vitrail
from vitrail.data.shapes import load_shapes
from vitrail.training.run_folder import load_split

COUNT = 400
"""Pictures of each kind."""
SIDE = 32
PHOTOS = (
    "astronaut", "coffee", "camera", "coins", "rocket", "moon", "grass", "brick", "gravel", "cell",
    "hubble_deep_field", "immunohistochemistry", "retina",
)  # fmt: skip
TEXTS = ("text", "page")


def main() -> None:
    classifier = vitrail.load(sys.argv[1])
    folder = Path(*sys.argv[2:3] or ["data"])
    images = {
        split: load_split(classifier, split, data_path=folder).raw_BCHW.permute(0, 2, 3, 1).numpy()
        for split in ("validation", "test")
    }
    scores = {kind: score(classifier, raw_BHWC) for kind, raw_BHWC in (images | unlike()).items()}
    thresholds_S = np.quantile(scores["validation"], 0.05, axis=0)
    for kind, found_BS in scores.items():
        both = np.concatenate([scores["test"], found_BS])
        known_B = np.arange(len(both)) < len(scores["test"])
        row = {"kind": kind, "pictures": len(found_BS)}
        for number, name in enumerate(("familiarity", "energy")):
            row[f"{name}_auroc"] = round(roc_auc_score(known_B, both[:, number]), 3)
            row[f"{name}_below"] = float((found_BS < thresholds_S).mean(0)[number].round(3))
        print(json.dumps(row))


def score(classifier: vitrail.Classifier, raw_BHWC: np.ndarray) -> np.ndarray:
    """Return familiarity and energy (B, 2): high for pictures like the training images."""
    logits_BY, familiarity_B = classifier.raw_outputs(raw_BHWC.astype(np.uint8))
    assert familiarity_B is not None, "the model was trained with too few validation images"
    energy_B = np.logaddexp.reduce(logits_BY, axis=1)
    return np.stack([familiarity_B, energy_B], axis=1)


def unlike() -> dict[str, np.ndarray]:
    """Return pictures (B, H, W, 3) of other kinds."""
    random = np.random.default_rng(0)
    digits = load_digits().images[:COUNT] * (255 / 16)
    return {
        "shapes": load_shapes("test").raw_BCHW[:COUNT].permute(0, 2, 3, 1).numpy(),
        "digits": np.stack([fit(Image.fromarray(image.astype(np.uint8))) for image in digits]),
        "text": crops(TEXTS, random),
        "photographs": crops(PHOTOS, random),
        "noise like photographs": np.stack([pink_noise(random) for _ in range(COUNT)]),
        "white noise": random.integers(0, 256, (COUNT, SIDE, SIDE, 3)),
        "one color": np.tile(random.integers(0, 256, (COUNT, 1, 1, 3)), (1, SIDE, SIDE, 1)),
    }


def fit(image: Image.Image) -> np.ndarray:
    """Return a picture at the model's size, in color."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def crops(names: tuple[str, ...], random: np.random.Generator) -> np.ndarray:
    """Return square parts of scikit-image's pictures, a third to all of their shorter side."""
    pictures = []
    for number in range(COUNT):
        image = Image.fromarray(getattr(skimage.data, names[number % len(names)])())
        side = int(random.integers(min(image.size) // 3, min(image.size) + 1))
        left, top = (int(random.integers(length - side + 1)) for length in image.size)
        pictures.append(fit(image.crop((left, top, left + side, top + side))))
    return np.stack(pictures)


def pink_noise(random: np.random.Generator) -> np.ndarray:
    """Return noise whose amplitude falls with the frequency, as in photographs."""
    waves = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    waves[0, 0] = 1
    flat = random.normal(size=(4, SIDE, SIDE))
    gray_HW, *rest = np.fft.ifft2(np.fft.fft2(flat) / waves).real
    color_HWC = gray_HW[:, :, None] + 0.4 * np.stack(rest, axis=-1)
    return np.clip(128 + 60 * color_HWC / color_HWC.std(), 0, 255)


if __name__ == "__main__":
    main()
