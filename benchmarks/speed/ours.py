"""Vitrail's own work in a worker process: what the commands do, without writing files.

python ours.py SPEC        (see jobs.py)
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from speed.jobs import plain
from speed.worker import Measure, Spec, autocast, random_batch, serve
from vitrail.cli.process import keep_freed_memory
from vitrail.config.files import from_json
from vitrail.config.settings import Config, DataConfig
from vitrail.data.batches import Batch, Batches
from vitrail.data.datasets import load_data
from vitrail.data.images import ImageSet
from vitrail.evaluation.metrics import measure as score
from vitrail.evaluation.metrics import predict_logits
from vitrail.explain.map_settings import MapSettings
from vitrail.explain.methods import compute_maps
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng
from vitrail.training.loop import count_flops, train
from vitrail.training.state import TrainingState
from vitrail.weights.pretrained import load

EPOCH_IMAGES = 50_000
"""The size of CIFAR-10's training split; the content of the images does not affect the speed."""
LARGEST_SET = 2**28
"""Maximum size of a set of random images, in bytes."""
LEAST_SECONDS = 0.1
"""Matrix products are repeated for at least this long."""


class OneBatch:
    """The same batch for every step, instead of ``Batches``."""

    steps_per_epoch = 1_000

    def __init__(self, batch: Batch) -> None:
        self.batch, self.device = batch, batch.labels_B.device

    def __call__(self, _step: int) -> Batch:
        """Return the batch."""
        return self.batch


def settings(spec: Spec) -> tuple[Config, torch.device]:
    """Return the spec's settings and device."""
    return from_json(spec["config"]), torch.device(spec["device"])


def fresh_model(config: Config, device: torch.device) -> VisionTransformer:
    """Return a model before training."""
    with rng.seeded(config.run.seed, "init", device=device):
        return VisionTransformer(config.model).to(device)


def noise(config: Config, count: int) -> ImageSet:
    """Return random images."""
    model = config.model
    shape = (model.n_channels, *model.image_hw)
    count = min(count, LARGEST_SET // (shape[0] * shape[1] * shape[2]))
    generator = torch.Generator().manual_seed(config.run.seed)
    raw_BCHW = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels_B = torch.arange(count) % model.n_classes
    return ImageSet(raw_BCHW, labels_B, tuple(f"class {y}" for y in range(model.n_classes)))


def training_measure(config: Config, batches: Any) -> Measure:
    """Return a function that trains N steps as ``vitrail train`` does and returns their images."""
    state = TrainingState.start(fresh_model(config, batches.device), config.training)

    def updates() -> Iterator[Any]:
        while True:
            state.step = 0
            yield from train(state, batches, config)

    endless = updates()
    return lambda steps: float(sum(update.images for update in islice(endless, steps)))


def step_measure(spec: Spec) -> Measure:
    """Training steps on one batch in memory."""
    config, _ = settings(spec)
    images_BCHW, labels_B = random_batch(spec)
    targets_BY = F.one_hot(labels_B, config.model.n_classes).float()
    return training_measure(config, OneBatch(Batch(images_BCHW, targets_BY, labels_B)))


def epoch_measure(spec: Spec) -> Measure:
    """Training with data and augmentation."""
    config, device = settings(spec)
    batches = Batches(noise(config, EPOCH_IMAGES), config, device=device)
    return training_measure(config, batches)


def batch_measure(spec: Spec, apply: Callable[[VisionTransformer, Tensor], object]) -> Measure:
    """Return a function that applies something to the model and one batch in memory N times."""
    config, device = settings(spec)
    model = fresh_model(config, device).eval()
    images_BCHW, _ = random_batch(spec)

    def measure(batches: int) -> float:
        with torch.inference_mode(), autocast(spec):
            for _ in range(batches):
                apply(model, images_BCHW)
        return float(batches * len(images_BCHW))

    return measure


def inference_measure(spec: Spec) -> Measure:
    """Logits of one batch in memory."""
    return batch_measure(spec, lambda model, images_BCHW: model(images_BCHW))


def attention_measure(spec: Spec) -> Measure:
    """Logits and the attention of every layer."""
    return batch_measure(spec, lambda model, images_BCHW: model.forward_with_attention(images_BCHW))


def explanation_measure(spec: Spec) -> Measure:
    """Attention rollout through all layers."""
    config, _ = settings(spec)
    maps = MapSettings(method="rollout", layers=(config.model.n_layers,))
    return batch_measure(spec, lambda model, images_BCHW: compute_maps(model, images_BCHW, maps))


def scoring(spec: Spec, model: VisionTransformer, images: ImageSet, data: DataConfig) -> Tensor:
    """Evaluate a model as ``vitrail test`` does; return the logits."""
    logits_BY = predict_logits(
        model, images, mean=data.mean, std=data.std, device=torch.device(spec["device"]),
        precision=spec["precision"],
    )  # fmt: skip
    score(logits_BY, images.labels_B, classes=images.classes)
    return logits_BY


def test_measure(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Testing: the reference's weights on CIFAR-10 if it saved them, else random images."""
    config, device = settings(spec)
    weights, about = Path(spec["folder"]) / "w.pt", {}
    if weights.is_file():
        heads = config.model.n_attention_heads
        classifier = load(weights, n_attention_heads=heads, device=spec["device"])
        model, data = classifier.model, DataConfig("cifar10", Path(spec["data_path"]))
        images = load_data(data, ["test"], image_hw=config.model.image_hw).images["test"]
        images = images.take(torch.arange(spec["images"]))  # as the reference does
        theirs_BY = torch.load(weights.with_name("logits.pt"), weights_only=True).softmax(dim=1)
        ours_BY = scoring(spec, model, images, data).softmax(dim=1)
        about = {
            "largest_difference": (ours_BY - theirs_BY).abs().max().item(),
            "mean_confidence": theirs_BY.amax(dim=1).mean().item(),
        }
    else:
        model, data = fresh_model(config, device), config.data
        images = noise(config, spec["images"])

    def measure(passes: int) -> float:
        for _ in range(passes):
            scoring(spec, model, images, data)
        return float(passes * len(images))

    return measure, about


def predict_measure(spec: Spec) -> Measure:
    """Logits of N images; the request is N."""
    config, device = settings(spec)
    model, images = fresh_model(config, device), noise(config, spec["images"])

    def measure(count: int) -> float:
        some, data = images.sample(count), config.data
        logits_BY = predict_logits(model, some, mean=data.mean, std=data.std, device=device)
        return float(len(logits_BY))

    return measure


def product_measure(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Matrix products of the size and precision in a request; counts operations."""
    config, device = settings(spec)
    factors: dict[str, tuple[Tensor, Tensor, int]] = {}

    def prepare(request: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
        rows, inner, columns = request["size"]
        dtype = getattr(torch, request["precision"])
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        repeat(left, right, 1)  # the first one is slow
        began = time.perf_counter()
        repeat(left, right, 1)
        seconds = time.perf_counter() - began
        return left, right, max(1, round(LEAST_SECONDS / seconds))

    def repeat(left: Tensor, right: Tensor, times: int) -> None:
        for _ in range(times):
            left @ right
        getattr(torch, spec["device"]).synchronize()

    def measure(request: dict[str, Any]) -> float:
        key = json.dumps(request)
        if key not in factors:
            factors[key] = prepare(request)
        left, right, times = factors[key]
        repeat(left, right, times)
        return 2.0 * left.numel() * right.shape[1] * times

    operations = {"ours": count_flops(config.model), "plain": count_flops(plain(config.model))}
    return measure, {"operations": operations}


WORKLOADS: dict[str, Callable[[Spec], Measure | tuple[Measure, dict[str, Any]]]] = {
    "step": step_measure,
    "epoch": epoch_measure,
    "inference": inference_measure,
    "test": test_measure,
    "explanation": explanation_measure,
    "attention": attention_measure,
    "predict": predict_measure,
    "product": product_measure,
}


def build(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Return what the spec measures, and facts about it."""
    built = WORKLOADS[spec["workload"]](spec)
    return built if isinstance(built, tuple) else (built, {})


if __name__ == "__main__":
    keep_freed_memory()
    serve(build, json.loads(sys.argv[1]))
