"""Training as a whole, beside the reference system's own code: model, optimizer and data loading.

    git clone https://github.com/nick8592/ViT-Classification-CIFAR10 reference
    pip install torchvision
    python benchmarks/reference_epoch.py --reference_path reference

Both train the 6-layer model on CIFAR-10 with crop, flip and RandAugment. In every round the
reference makes its updates with its own DataLoader and worker processes, then ours makes as many.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from timing import interleave, report, training

from vitrine.configfile import from_json
from vitrine.presets import get_preset


def reference(folder: Path, data_path: Path, steps: int) -> Callable[[], float]:
    """Return a function that trains with the reference's own code."""
    sys.path.insert(0, str(folder))
    import model as reference_model
    import train as reference_train

    options: Any = SimpleNamespace(
        image_size=32, data_path=str(data_path), num_train_images=None, num_test_images=None,
        batch_size=128, num_workers=2,
    )  # fmt: skip
    loader, _ = reference_train.dataloader(options)
    vit = reference_model.VisionTransformer(
        n_channels=3, embed_dim=128, n_layers=6, n_attention_heads=4, forward_mul=2,
        image_size=32, patch_size=4, n_classes=10, dropout=0.1,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vit.parameters(), 5e-4, weight_decay=1e-3)

    def measure() -> float:
        vit.train()
        began, images = time.perf_counter(), 0
        for number, (x, y) in enumerate(loader):
            logits, _ = vit(x)
            loss = F.cross_entropy(logits, y)
            loss.item()
            (y == logits.max(1)[1]).float().mean().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images += len(y)
            if number + 1 == steps:
                break
        return images / (time.perf_counter() - began)

    return measure


def main(
    reference_path: Path, data_path: Path = Path("data"), rounds: int = 3, steps: int = 30
) -> None:
    """Time both in turn.

    Args:
        reference_path: a clone of the reference system.
        data_path: where CIFAR-10 is.
        rounds: rounds that count, after one that does not.
        steps: updates in a round.
    """
    seed = from_json({"data": {"data_path": str(data_path)}}, get_preset("seed"))
    contestants = {
        "reference": reference(reference_path, data_path, steps),
        "vitrine, preset seed": training(seed, steps),
    }
    report("Training on CIFAR-10", interleave(contestants, rounds=rounds), steps=steps)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
