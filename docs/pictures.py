"""Draw the README's picture: ``python docs/pictures.py MODEL docs/pictures/attention.png``."""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import vitrine
from vitrine.data.images import ImageSet, normalise
from vitrine.data.shapes import load_shapes
from vitrine.predict import Classifier

COLUMNS = 7


def main(model: str, out: str) -> None:
    """Draw test shapes in the upper row, and below each what got the model's attention."""
    classifier = vitrine.load(model, device="cpu")
    images = load_shapes("test").first(COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 4.4), layout="tight", facecolor="white")
    axes = figure.subplots(2, COLUMNS)
    masks, words = rollout_masks(classifier, images), predictions(classifier, images)
    columns = zip(images.raw_BCHW, masks, words, strict=True)
    for index, (raw_CHW, mask_HW, said) in enumerate(columns):
        raw_HWC = raw_CHW.permute(1, 2, 0).numpy()
        axes[0, index].imshow(raw_HWC)
        axes[1, index].imshow((raw_HWC * mask_HW[..., None]).astype("uint8"))
        axes[0, index].set_title(said, fontsize=13)
        for row in axes[:, index]:
            row.set_axis_off()
    figure.savefig(out, dpi=90)


def predictions(classifier: Classifier, images: ImageSet) -> list[str]:
    """Return each image's most probable class with its probability."""
    arrays = list(images.raw_BCHW.permute(0, 2, 3, 1).numpy())
    return [f"{top[0].name} {top[0].probability:.0%}" for top in classifier.predict(arrays)]


def rollout_masks(classifier: Classifier, images: ImageSet) -> list[np.ndarray]:
    """Return for each image what its patches got of the attention over all blocks, 0 to 1."""
    images_BCHW = normalise(images.raw_BCHW, classifier.mean, classifier.std)
    with torch.inference_mode():
        _, attentions = classifier.model.forward_with_attention(images_BCHW)
    identity_TT = torch.eye(attentions[0].shape[-1])
    flow_BTT = identity_TT.expand(len(images_BCHW), -1, -1)
    for attention_BATT in attentions:
        flow_BTT = (attention_BATT.mean(1) + identity_TT) / 2 @ flow_BTT
    masks_BGJ = flow_BTT.mean(1).view(-1, *classifier.config.model.grid_GJ)
    low, high = masks_BGJ.amin((1, 2), keepdim=True), masks_BGJ.amax((1, 2), keepdim=True)
    scaled = ((masks_BGJ - low) / (high - low) * 255).byte().numpy()
    size_wh = images.raw_BCHW.shape[:1:-1]
    resized = [Image.fromarray(mask).resize(size_wh, Image.Resampling.BILINEAR) for mask in scaled]
    return [np.asarray(mask) / 255 for mask in resized]


if __name__ == "__main__":
    main(*sys.argv[1:])
