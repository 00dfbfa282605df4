"""Classify pictures in Python: ``python examples/classify.py MODEL PICTURE [PICTURE ...]``."""

import sys

import torch

import vitrail


def main(model: str, *pictures: str) -> None:
    """Print the most probable classes of each picture, and the shape of the attention tensor."""
    classifier = vitrail.load(model)
    for picture, predictions in zip(pictures, classifier.predict(pictures), strict=True):
        print(picture, *(f"{p.name} {p.probability:.1%}" for p in predictions))
    images = classifier.prepare(pictures)
    with torch.inference_mode():
        _, attentions = classifier.model.forward_with_attention(images)
    print(f"{len(attentions)} blocks; attention of the last one: {tuple(attentions[-1].shape)}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
