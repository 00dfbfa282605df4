"""Everything works on a simulated Apple MPS, without float64 and eigenvectors."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from limited_device import DEVICE, MOVED, DeviceTensor, limited_device
from vitrail.cli import main
from vitrail.config.files import from_json
from vitrail.config.presets import get_preset
from vitrail.config.settings import AugmentConfig, Config
from vitrail.data.augment import random_crop, random_erasing
from vitrail.data.images import ImageSet, normalize
from vitrail.explain.map_settings import METHODS, VIEWS
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import hardware
from vitrail.training.run import Run
from vitrail.weights import pretrained

FEW = {
    "data": {"num_train_images": 60, "validation_images": 20, "num_test_images": 12},
    "training": {"epochs": 1, "batch_size": 30},
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """An available device, chosen by runs."""
    for module in (hardware, pretrained):
        monkeypatch.setattr(module, "choose_device", lambda _: DEVICE)
    states = {"get_rng_state": lambda: torch.zeros(1), "set_rng_state": id, "manual_seed": id}
    for name, function in states.items():
        monkeypatch.setattr(torch.mps, name, function)
    with limited_device() as device:
        yield device


def trained(config: Config, folder: Path) -> Run:
    """Return a run that has trained to its end."""
    folder.mkdir()
    run = Run.start(config, folder)
    for _ in run.train():
        pass
    return run


def test_the_simulation_refuses_what_the_device_cannot_do(device: torch.device) -> None:
    there = torch.ones(2, 3).to(device)
    assert isinstance(there, DeviceTensor)
    assert there.cpu().tolist() == [[1.0] * 3] * 2
    with pytest.raises(TypeError, match="float64"):
        there.double()
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2).double().to(device)
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2, device=device, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="eigh"):
        torch.linalg.eigh(there @ there.mT)
    with pytest.raises(RuntimeError, match="tensors on"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device=device, generator=torch.Generator())


def test_quick_trains_and_its_model_is_tested_inspected_and_scored(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        Figure, "savefig", lambda *_, **__: None
    )  # plots do not depend on the device, and take long
    few = "--num_train_images 60 --validation_images 20 --num_test_images 12 --batch_size 30"
    few += " --patch_size 8 --n_layers 2"  # fewer passes to score, of half the length
    assert main(["train", *few.split(), "--preset", "quick", "--epochs", "1"]) == 0
    assert json.loads(Path("output/quick/env.json").read_text())["device"].startswith("mps")
    assert json.loads(Path("output/quick/result.json").read_text())["test"]["images"] == 12
    model = ["--model_path", "output/quick"]
    part = ["--split", "validation"]
    assert main(["test", *model, *part]) == 0
    assert main(["inspect", *model, *part, "--images", "10", "--output_path", "inside"]) == 0
    distances = json.loads(Path("inside/insides.json").read_text())["attention_distance_pixels"]
    assert np.isfinite(distances).all()
    score = ["explain", "--score", "--method", "relevance", *model, *part, "--images", "10"]
    assert main(score) == 0
    classifier = pretrained.load("output/quick")
    assert all(isinstance(weight, DeviceTensor) for weight in classifier.model.parameters())
    picture = np.zeros((9, 7, 3), np.uint8)
    assert len(classifier.predict(picture)[0]) == 3
    fewer = {"shapley": {"passes": 6}, "integrated_gradients": {"points": 2}}
    for method in (*METHODS, *VIEWS):
        assert classifier.explain(picture, method=method, **fewer.get(method, {})).frames


def test_every_other_part_of_training_runs_and_resumes(
    device: torch.device, tmp_path: Path
) -> None:
    augment = AugmentConfig(
        randaugment_ops=2, random_erasing=0.5, mixup=0.5, cutmix=0.5, crop_padding=3,
        patch_drop=0.7,
    )  # fmt: skip
    sections = {
        **FEW,
        "model": {"drop_path": 0.2, "n_layers": 2, "embed_dim": 24, "position": "sincos"},
        "training": {
            "epochs": 2, "batch_size": 20, "ema_decay": 0.9, "accumulate": 2, "clip_norm": 1.0,
            "layer_decay": 0.8, "optimizer": "muon",
        },
    }  # fmt: skip
    config = dataclasses.replace(from_json(sections, Config()), augment=augment)
    one_go = trained(config, tmp_path / "one-go")
    (tmp_path / "parts").mkdir()
    first = Run.start(config, tmp_path / "parts")
    next(first.train())
    first.save()
    second = Run.resume(tmp_path / "parts", first.config)
    for _ in second.train():
        pass
    assert second.state.step == one_go.state.step == 6
    for name, tensor in one_go.state.weights().items():
        assert torch.equal(tensor.cpu(), second.state.weights()[name].cpu()), name


def test_white_patches_are_the_same_on_every_device(device: torch.device) -> None:
    config = from_json({"model": {"n_classes": 3}}, get_preset("quick")).model
    generator = torch.Generator().manual_seed(1)
    raw_BCHW = torch.randint(256, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = ImageSet(raw_BCHW, torch.arange(20) % 3, tuple("abc"))
    kernels = []
    for place in (torch.device("cpu"), device):
        model = VisionTransformer(config).to(place)
        images_BCHW = normalize(images.raw_BCHW, (0.5,) * 3, (0.5,) * 3).to(place)
        model.stem.whiten(images_BCHW)  # type: ignore[operator]
        kernels.append(model.stem.state_dict()["0.weight"].cpu())
    assert torch.equal(kernels[0], kernels[1])


def test_augmentation_moves_no_more_than_it_needs(device: torch.device) -> None:
    B, C, H, W = 40, 3, 12, 20
    generator = torch.Generator().manual_seed(1)
    raw_BCHW = torch.randint(256, (B, C, H, W), generator=generator, dtype=torch.uint8)
    there_BCHW = raw_BCHW.to(device)
    del MOVED[:]
    random_crop(there_BCHW, generator, 2)
    assert sum(MOVED) == B * H * W * (8 + 1)  # an index and a mask for each place, not channel
    del MOVED[:]
    erased_BCHW = random_erasing(there_BCHW, generator, 0.25).cpu()
    erased = int((erased_BCHW != raw_BCHW).flatten(1).any(1).sum())
    assert 3 < erased < 20
    per_image = 8 + H * W + C * H * W  # number, mask, noise
    assert erased * per_image <= sum(MOVED) <= (erased + 2) * per_image  # a box may be empty
