"""Figures in the documents agree with the presets, the records and the bundled model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitrail.config.presets import PRESETS
from vitrail.explain.stored_scores import read_verdict
from vitrail.model.vit import VisionTransformer
from vitrail.training.loop import count_flops
from vitrail.weights import bundled
from vitrail.weights.pretrained import load, scores_path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = ROOT / "docs/how-to"
TRAIN_IMAGES = {"shapes": 9_000, "cifar10": 45_000}


def rows_of(text: str, name: str) -> list[list[str]]:
    """Return the cells of all table rows whose first cell has a name in backticks."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [cells for cells in rows if cells and f"`{name}`" in cells[0]]


def rounded(value: float) -> float:
    return float(f"{value:.2g}")


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets(name: str) -> None:
    (row, _measured), config = rows_of((GUIDES / "presets.md").read_text(), name), get(name)
    model = replace(config.model, n_classes=10)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in VisionTransformer(model).parameters())
    rows, columns = model.grid_GJ
    images = TRAIN_IMAGES[config.data.dataset] + 5_000 * (config.data.validation_images == 0)
    flops = count_flops(model)[1] * images * config.training.epochs
    millions, tokens, epochs, petaflops = row[-4:]
    assert float(millions.removesuffix(" M")) == rounded(parameters / 1e6)
    assert int(tokens) == rows * columns + model.n_prefix_tokens
    assert int(epochs) == config.training.epochs
    assert float(petaflops) == rounded(flops / 1e15)


def get(name: str):  # type: ignore[no-untyped-def]
    return PRESETS[name].config


@pytest.mark.parametrize("document", ["README.md", "docs/how-to/presets.md"])
def test_results_are_those_of_the_records(document: str) -> None:
    text = (ROOT / document).read_text()
    found = re.findall(r"^\| .*?(\d[\d.± ]*%) \((?:1 seed|\d seeds)\).*$", text, re.MULTILINE)
    assert len(found) >= 4
    records = "\n".join(path.read_text() for path in ROOT.glob("records/*/README.md"))
    for accuracy in found:
        assert accuracy in records, accuracy


@pytest.mark.parametrize("name", bundled.names())
def test_the_card_of_a_bundled_model_is_that_of_its_record(name: str) -> None:
    card = bundled.read_card(name)
    assert f"{card.test_accuracy:.2%}" in (ROOT / card.record / "README.md").read_text()
    assert f"{card.test_accuracy:.2%}" in README
    preset = PRESETS[re.split(r"\W", card.recipe)[0]]  # of a run folder such as small-1
    assert f"{card.test_accuracy:.1%}" in preset.expect


def test_the_temperature_of_the_bundled_model() -> None:
    text = (GUIDES / "trust-a-prediction.md").read_text()
    (row,) = rows_of(text, "cifar10")
    assert row[1] == f"{load('cifar10', device='cpu').calibration.temperature:.2f}"


def test_the_scores_of_the_bundled_models_maps() -> None:
    stored = scores_path("cifar10")
    assert stored is not None
    verdict = read_verdict(stored, load("cifar10", device="cpu").model)
    assert verdict is not None, "the scores are those of other weights"
    best = [badge.method for badge in sorted(verdict.badges, key=lambda badge: -badge.srg)]
    said = re.search(r"`(\S+)` is the most\s+faithful, then\s+`(\S+)` and `(\S+)`", README)
    assert said is not None
    of_methods: dict[str, str] = {}  # the best variant of each
    for variant in best:
        of_methods.setdefault(variant.partition(":")[0], variant)
    assert list(said.groups()) == list(of_methods.values())[:3]
    text = (GUIDES / "see-through-it.md").read_text()
    listed = dict(re.findall(r"^\| (\S+) \| (\d\.\d{3}) \|", text, re.MULTILINE))
    scores = {badge.method: badge.srg for badge in verdict.badges}
    assert listed == {name: f"{srg:.3f}" for name, srg in scores.items() if srg > 0}
