"""The sentence on which map to trust, and badges that are shown for the scored weights only."""

import json
from pathlib import Path

import pytest
import torch

from vitrail.config.settings import ModelConfig
from vitrail.explain.map_metrics import Estimate, Score
from vitrail.explain.map_report import trust_text
from vitrail.explain.recommendation import judge
from vitrail.explain.sanity import Sanity
from vitrail.explain.stored_scores import FORMAT, fingerprint, read_verdict, to_json
from vitrail.model.vit import VisionTransformer

NOISE_B = torch.linspace(-0.1, 0.1, 20)


def scored(method: str, srg: float, *, beats: bool = True, noise: float = 1.0) -> Score:
    """A score whose SRG varies from image to image as that of the others, scaled by ``noise``."""
    values = tuple((srg + noise * NOISE_B).tolist())
    estimate = Estimate(srg, srg - 0.05, srg + 0.05)
    return Score(method, 20, {"srg": estimate}, {"srg": beats}, (), {}, values, 1.0)


def checked(method: str, similarity: float = 0.0, in_tile: float | None = 0.6) -> Sanity:
    share = None if in_tile is None else Estimate(in_tile, in_tile - 0.01, in_tile + 0.01)
    return Sanity(method, {"stem": Estimate(similarity, similarity, similarity)}, share)


def test_the_best_that_passes_is_trusted_and_ties_are_named() -> None:
    scores = [
        scored("rollout", 0.9), scored("gradcam", 0.8, beats=False), scored("balanced", 0.7),
        scored("occlusion", 0.699, noise=-1.0), scored("shapley", 0.5), scored("attention", 0.95),
    ]  # fmt: skip
    checks = [
        checked("rollout", in_tile=0.25), checked("gradcam"), checked("balanced"),
        checked("occlusion", in_tile=None), checked("shapley"), checked("attention", 0.9),
    ]  # fmt: skip
    verdict = judge("validation", scores, checks)
    assert [badge.method for badge in verdict.badges[:2]] == ["attention", "rollout"]
    failures = {badge.method: badge.failures for badge in verdict.badges}
    # By construction, whatever the mosaics say.
    assert failures["attention"] == (
        "does not depend on the model", "does not depend on the class",
    )  # fmt: skip
    assert failures["rollout"] == ("does not depend on the class",)
    assert failures["gradcam"] == ("no better than a control",)
    assert failures["occlusion"] == failures["balanced"] == failures["shapley"] == ()
    assert verdict.trust == (
        "Trust balanced on this model: the highest SRG of the 3 methods that pass every test; "
        "occlusion is on a par."
    )
    assert "rollout fails: does not depend on the class" in str(trust_text(verdict))


def test_one_or_no_method_that_passes() -> None:
    only = judge("test", [scored("balanced", 0.5)], [checked("balanced")])
    assert "balanced on this model" in only.trust
    assert "the only method that passes every test" in only.trust
    names = ("balanced", "occlusion:window=3")
    both = judge("test", [scored(n, 0.5) for n in names], [checked(n) for n in names])
    assert "the 2 methods and variants that pass every test" in both.trust
    none = judge("test", [scored("balanced", 0.5, beats=False)], [checked("balanced")])
    assert none.trust.startswith("Trust none of these maps")


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=8, patch_size=4, embed_dim=8, n_layers=1, n_attention_heads=2, n_classes=3
    )
    return VisionTransformer(config).eval()


def test_a_verdict_is_read_for_the_same_weights_only(
    tmp_path: Path, model: VisionTransformer
) -> None:
    verdict = judge("validation", [scored("balanced", 0.5)], [checked("balanced", in_tile=None)])
    path = tmp_path / "scores.json"
    assert read_verdict(path, model) is None
    content = to_json(verdict, model)
    path.write_text(json.dumps(content | {"scores": []}))  # a report holds more
    assert read_verdict(path, model) == verdict
    before = fingerprint(model)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert fingerprint(model) != before
    assert read_verdict(path, model) is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": FORMAT + 1},
        {"badges": 3},
        {"badges": [{"method": "x"}]},
        {"images": "many"},
        {"images": float("inf")},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_ignored(
    tmp_path: Path, model: VisionTransformer, change: dict[str, object]
) -> None:
    verdict = judge("validation", [scored("balanced", 0.5)], [checked("balanced")])
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(to_json(verdict, model)))
    assert read_verdict(path, model) == verdict
    path.write_text(json.dumps(to_json(verdict, model) | change))
    assert read_verdict(path, model) is None
    for text in ("", "[]", "{", "null", "[" * 100_000):
        path.write_text(text)
        assert read_verdict(path, model) is None
