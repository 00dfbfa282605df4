"""Map metrics on cases worked by hand, and the table's comparison with control maps."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, stdev

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from vitrail.config.settings import ModelConfig
from vitrail.data import fills
from vitrail.data.fills import FILLS
from vitrail.errors import CheckpointError, ConfigError, DataError, OutputError
from vitrail.explain import map_metrics, map_report
from vitrail.explain.best_order import Ceiling, best_orders, find_ceiling
from vitrail.explain.deletion_insertion import deletion_insertion, rank_patches
from vitrail.explain.faithfulness import faithfulness_correlation, hidden_sets, logit_drops
from vitrail.explain.map_metrics import (
    CONTROLS,
    MEASURES,
    Estimate,
    Outcome,
    Score,
    center_maps,
    estimate_mean,
    half_width,
    mass_inside,
    paired_differences,
    pointing_game,
    score_methods,
    significantly_above_zero,
    summarize,
    t_quantile,
)
from vitrail.explain.map_report import plot_ranking, plot_scores, score_table
from vitrail.explain.map_settings import METHODS, MapSettings
from vitrail.explain.methods import compute_maps
from vitrail.explain.stored_scores import Badge, Verdict
from vitrail.model.vit import VisionTransformer

PLACE = (1, 3)
"""The one patch, by row and column, that ``OnePatch`` looks at; the grid has 3 x 5 patches."""


class OnePatch(nn.Module):
    """Probability 0.9 of class 1 while one patch is bright, 0.2 while it is not."""

    config = ModelConfig(image_size=(12, 20), n_classes=2, patch_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.batches.append(len(images_BCHW))
        row, column = (4 * n for n in PLACE)
        bright_B = images_BCHW[:, 0, row : row + 4, column : column + 4].mean((1, 2)) > 0.9
        yes_B = torch.where(bright_B, 0.9, 0.2)
        return torch.stack([1 - yes_B, yes_B], dim=1).log()


def bright_patch(count: int = 1) -> Tensor:
    """Images that are dark but for the patch that ``OnePatch`` looks at."""
    images_BCHW = torch.zeros(count, 3, 12, 20)
    row, column = (4 * n for n in PLACE)
    images_BCHW[:, :, row : row + 4, column : column + 4] = 1
    return images_BCHW


def map_of(values: dict[tuple[int, int], float]) -> Tensor:
    """One map of 3 x 5 patches: these values, and small different ones elsewhere."""
    map_GJ = torch.linspace(0, 0.01, 15).view(3, 5)
    for place, value in values.items():
        map_GJ[place] = value
    return map_GJ[None]


# Maps against masks


def test_pointing_game_asks_for_the_highest_point_as_it_is_drawn() -> None:
    masks_BHW = torch.zeros(2, 12, 20, dtype=torch.bool)
    masks_BHW[:, 4:8, 12:16] = True  # the patch at (1, 3)
    maps_BGJ = torch.cat([map_of({(1, 3): 1.0}), map_of({(1, 2): 1.0})])
    assert pointing_game(maps_BGJ, masks_BHW).tolist() == [1, 0]


def test_the_highest_point_is_the_middle_of_a_patch() -> None:
    """With a patch of 4 it lies between the pixels 5 and 6, 13 and 14."""
    mask_1HW = torch.zeros(1, 12, 20, dtype=torch.bool)
    mask_1HW[0, 4, 12:16] = True
    assert pointing_game(map_of({(1, 3): 1.0}), mask_1HW).tolist() == [0]
    mask_1HW[0, 5, 13] = True
    assert pointing_game(map_of({(1, 3): 1.0}), mask_1HW).tolist() == [0.25]
    nine_1HW = torch.zeros(1, 9, 15, dtype=torch.bool)
    nine_1HW[0, 4, 10] = True  # the middle of the patch at (1, 3), of 3 pixels a side
    assert pointing_game(map_of({(1, 3): 1.0}), nine_1HW).tolist() == [1]


def test_equally_high_patches_share_the_hit() -> None:
    mask_1HW = torch.zeros(1, 12, 20, dtype=torch.bool)
    mask_1HW[0, :4, :4] = True
    assert pointing_game(map_of({(0, 0): 1.0, (2, 1): 1.0}), mask_1HW).tolist() == [0.5]
    assert pointing_game(torch.full((1, 3, 5), 0.3), mask_1HW).item() == pytest.approx(1 / 15)


def test_a_random_map_hits_the_border_no_more_than_the_middle() -> None:
    """The highest pixel of a map drawn bilinearly would: on the border nothing rounds it off."""
    border_1HW = torch.ones(1, 12, 20, dtype=torch.bool)
    border_1HW[:, 4:8, 4:16] = False
    maps_BGJ = torch.rand((4000, 3, 5), generator=torch.Generator().manual_seed(7))
    hits_B = pointing_game(maps_BGJ, border_1HW.expand(4000, -1, -1))
    assert hits_B.mean().item() == pytest.approx(12 / 15, abs=0.02)


def test_mass_inside_by_hand() -> None:
    """Two patches of 2 pixels laid over 4 pixels: the first's weights are 1, 3/4, 1/4, 0."""
    mask_1HW = torch.tensor([[[False, True, True, False], [False, True, False, False]]])
    for lowest in (0.0, 0.5):
        map_1GJ = torch.tensor([[[1.0, lowest]]])
        assert mass_inside(map_1GJ, mask_1HW).item() == pytest.approx((0.75 + 0.25 + 0.75) / 4)


def test_mass_below_zero_counts_nothing() -> None:
    map_1GJ = torch.tensor([[[1.0, -5.0]]])
    mask_1HW = torch.tensor([[[True, True, True, False]]])
    assert mass_inside(map_1GJ, mask_1HW).item() == pytest.approx(1)
    mask_1HW = torch.tensor([[[True, False, False, False]]])
    assert mass_inside(map_1GJ, mask_1HW).item() == pytest.approx(0.5)


def test_a_uniform_map_has_its_mass_everywhere() -> None:
    mask_1HW = torch.zeros(1, 12, 20, dtype=torch.bool)
    mask_1HW[0, :3, :8] = True
    for value in (0.0, 0.3, -0.2):
        flat_1GJ = torch.full((1, 3, 5), value)
        assert mass_inside(flat_1GJ, mask_1HW).item() == pytest.approx(0.1)


# Deletion and insertion


@pytest.mark.parametrize("fill", ["mean", "blur"])
def test_a_correct_map_deletes_and_inserts_at_once(fill: str) -> None:
    curves = deletion_insertion(
        OnePatch(), bright_patch(), map_of({PLACE: 1.0}), torch.tensor([1]),
        fill=fill, steps=99,
    )  # fmt: skip
    assert curves.shares_S.tolist() == pytest.approx([n / 15 for n in range(16)])
    assert curves.deletion_BS[0].tolist() == pytest.approx([0.9] + [0.2] * 15)
    assert curves.insertion_BS[0].tolist() == pytest.approx([0.2] + [0.9] * 15)
    deletion_B, insertion_B = curves.areas()
    assert deletion_B.item() == pytest.approx(0.2 + 0.7 / 2 / 15)
    assert insertion_B.item() == pytest.approx(0.9 - 0.7 / 2 / 15)


def test_a_reversed_map_does_the_opposite() -> None:
    curves = deletion_insertion(
        OnePatch(), bright_patch(), map_of({PLACE: -1.0}), torch.tensor([1]), fill="mean"
    )
    assert curves.deletion_BS[0].tolist() == pytest.approx([0.9] * 15 + [0.2])
    assert curves.insertion_BS[0].tolist() == pytest.approx([0.2] * 15 + [0.9])


def test_steps_take_several_patches_and_the_areas_count_their_width() -> None:
    curves = deletion_insertion(
        OnePatch(), bright_patch(), map_of({PLACE: 1.0}), torch.tensor([1]),
        fill="mean", steps=4,
    )  # fmt: skip
    assert (curves.shares_S * 15).tolist() == pytest.approx([0, 4, 8, 11, 15])
    assert curves.areas()[0].item() == pytest.approx(0.2 + 0.7 / 2 * 4 / 15)


def test_images_do_not_depend_on_their_batch_and_batches_stay_small() -> None:
    model, count = OnePatch(), 7
    maps_BGJ = torch.rand((count, 3, 5), generator=torch.Generator().manual_seed(3))
    classes_B = torch.arange(count) % 2
    arguments = {"fill": "mean", "steps": 6}
    batch = deletion_insertion(
        model, bright_patch(count), maps_BGJ, classes_B, **arguments, batch_size=30
    )
    assert max(model.batches) <= 30
    assert len(model.batches) > 2
    for index in range(count):
        one = deletion_insertion(
            model, bright_patch(1), maps_BGJ[index, None], classes_B[index, None], **arguments
        )
        assert torch.equal(one.deletion_BS[0], batch.deletion_BS[index])
        assert torch.equal(one.insertion_BS[0], batch.insertion_BS[index])


def test_equal_patches_follow_in_a_shuffled_order() -> None:
    """Row by row would favor the top left corner."""
    ranks_BN = rank_patches(torch.zeros(2, 3, 5))
    assert ranks_BN[0].tolist() == ranks_BN[1].tolist() != list(range(15))
    assert sorted(ranks_BN[0].tolist()) == list(range(15))
    ranked_N = rank_patches(torch.arange(15.0).view(1, 3, 5))[0]
    assert ranked_N.tolist() == list(reversed(range(15)))


def test_fills_are_the_mean_color_and_a_blur() -> None:
    images_BCHW = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    mean_BCHW = fills.fill_images(images_BCHW, "mean")
    assert mean_BCHW[1, 2].unique().tolist() == [pytest.approx(images_BCHW[1, 2].mean().item())]
    point_1CHW = torch.zeros(1, 1, 31, 33)
    point_1CHW[0, 0, 15, 16] = 1
    blurred_HW = fills.blur(point_1CHW, 2.0)[0, 0]
    expected = NormalDist(0, 2).pdf(3) * NormalDist(0, 2).pdf(1)
    assert blurred_HW[18, 17].item() == pytest.approx(expected, rel=0.01)
    assert blurred_HW.sum().item() == pytest.approx(1, rel=1e-4)
    flat_1CHW = torch.full((1, 3, 5, 4), 0.7)
    torch.testing.assert_close(fills.blur(flat_1CHW, 3.0), flat_1CHW)


def test_maps_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        rank_patches(torch.full((1, 3, 5), math.nan))


# Controls


def test_the_central_map_is_symmetric() -> None:
    center_GJ = center_maps((3, 5))[0]
    assert center_GJ.argmax() == 7
    torch.testing.assert_close(center_GJ, center_GJ.flip(0, 1))
    assert center_GJ[1, 3].item() == pytest.approx(math.exp(-0.5 * (1 / 1.25) ** 2))


# Intervals


def test_quantiles_of_students_distribution() -> None:
    """The tables' values."""
    assert t_quantile(0.975, 9) == pytest.approx(2.262, abs=1e-3)
    assert t_quantile(0.975, 30) == pytest.approx(2.042, abs=1e-3)
    assert t_quantile(0.995, 15) == pytest.approx(2.947, abs=2e-3)
    assert t_quantile(0.975, 10**6) == pytest.approx(1.95996, abs=1e-4)


def test_interval_of_a_mean() -> None:
    values = [0.1, 0.4, 0.2, 0.8, 0.3, 0.9, 0.5, 0.7, 0.6, 0.0]
    estimate = estimate_mean(torch.tensor(values))
    assert estimate.mean == pytest.approx(0.45)
    half = 2.262 * stdev(values) / math.sqrt(10)
    assert estimate.high - estimate.mean == pytest.approx(half, rel=1e-3)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=1e-3)
    with pytest.raises(DataError, match="9 images are too few"):
        half_width(torch.rand(9))


def test_a_difference_is_significant_only_if_its_interval_is_above_zero() -> None:
    differences_B = torch.tensor([1.0, -1.0] * 10) + 0.5
    low = 0.5 - half_width(differences_B).item()
    assert low > 0
    assert significantly_above_zero(differences_B, error=0.05)
    assert not significantly_above_zero(differences_B, error=0.001)
    assert not significantly_above_zero(-differences_B, error=0.05)
    assert not significantly_above_zero(torch.zeros(20), error=0.05)
    assert significantly_above_zero(torch.ones(20), error=0.05)


# The table


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    config = ModelConfig(
        image_size=(12, 20), n_classes=3, patch_size=4, embed_dim=8, n_layers=2,
        n_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return VisionTransformer(config).eval()


@pytest.fixture(scope="module")
def scores(model: VisionTransformer) -> list[Score]:
    """An untrained model's, so that no method beats the controls by much."""
    generator = torch.Generator().manual_seed(5)
    images_BCHW = torch.randn(11, 3, 12, 20, generator=generator)
    masks_BHW = torch.rand(11, 12, 20, generator=generator) < 0.3
    return score_methods(model, images_BCHW, masks_BHW, ("rollout", "gradcam"), steps=4)


def text_of(
    scores: list[Score], verdict: Verdict | None = None, ceiling: Ceiling | None = None
) -> str:
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(score_table(scores, verdict, ceiling))
    return capture.get()


def made_scores(values: Callable[[str, str], Tensor]) -> list[Score]:
    """Scores of made-up values of each method and measure."""
    curves = {name: torch.tensor([0.9, 0.1]) for name in MEASURES if "_" in name}
    outcomes = {
        method: Outcome(
            {measure: values(method, measure) for measure in MEASURES},
            torch.tensor([0.0, 1.0]),
            curves,
        )
        for method in ("rollout", "gradcam", *CONTROLS)
    }
    return [summarize(name, outcomes, 0.05 / 12) for name in outcomes]


def test_methods_then_controls_are_scored_by_every_measure(scores: list[Score]) -> None:
    assert [score.method for score in scores] == ["rollout", "gradcam", *CONTROLS]
    assert [score.is_control for score in scores] == [False, False, True, True, True]
    for score in scores:
        assert score.n == 11
        assert list(score.estimates) == list(MEASURES)
        for estimate in score.estimates.values():
            assert estimate.low <= estimate.mean <= estimate.high
        assert len(score.shares) == len(score.curves["deletion_mean"]) == 5
        assert set(score.beats) == (set() if score.is_control else set(MEASURES))
    starts = {score.curves["deletion_mean"][0] for score in scores}
    assert len(starts) == 1, "nothing is deleted at the start"
    for score in scores:
        mean = {name: estimate.mean for name, estimate in score.estimates.items()}
        gains = [mean[f"insertion_{fill}"] - mean[f"deletion_{fill}"] for fill in FILLS]
        assert mean["srg"] == pytest.approx(sum(gains) / 2, abs=1e-6)
    json.dumps([score.to_json() for score in scores], allow_nan=False)


def test_variants_of_a_method_are_scored_beside_each_other(
    model: VisionTransformer, scores: list[Score]
) -> None:
    images_BCHW = torch.randn(11, 3, 12, 20, generator=torch.Generator().manual_seed(5))
    masks_BHW = torch.zeros(11, 12, 20, dtype=torch.bool)
    variant = MapSettings(method="rollout", fusion="max")
    plain, other = score_methods(model, images_BCHW, masks_BHW, ("rollout", variant), steps=4)[:2]
    assert (plain.method, other.method) == ("rollout", "rollout:fusion=max")
    assert plain.srg_B == scores[0].srg_B != other.srg_B


def test_differences_are_paired_and_downwards() -> None:
    """The images vary much more than the methods differ on each of them."""
    noise_B = torch.linspace(-0.5, 0.5, 20)
    wiggle_B = 0.01 * torch.tensor([1.0, -1.0] * 10)

    def values(method: str, measure: str) -> Tensor:
        level = {"rollout": 0.2, "gradcam": 0.3, "center": 0.1}.get(method, 0.0)
        return level + noise_B + wiggle_B * (method == "gradcam")

    found = paired_differences(made_scores(values))
    assert list(found) == ["gradcam", "rollout", "center", "random"]
    assert list(found["rollout"]) == ["center", "random", "blurred random"]
    mean, low, high = found["gradcam"]["rollout"]
    half = 2.093 * stdev(wiggle_B.tolist()) / math.sqrt(20)
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=1e-5)
    text = text_of(made_scores(values))
    assert f"{low:.3f} to {high:.3f}" in text
    assert "0.100 to 0.100" in text, "rollout above the center, the best control"


def test_areas_agree_with_the_curves(scores: list[Score]) -> None:
    for score in scores:
        for name, curve in score.curves.items():
            area = torch.trapezoid(torch.tensor(curve), torch.tensor(score.shares)).item()
            assert score.estimates[name].mean == pytest.approx(area, abs=1e-6)


def test_without_masks_only_deletion_and_insertion_are_measured(model: VisionTransformer) -> None:
    images_BCHW = torch.randn(10, 3, 12, 20, generator=torch.Generator().manual_seed(5))
    scored = score_methods(model, images_BCHW, None, ("attention",), steps=2)
    assert list(scored[0].estimates) == [m for m in MEASURES if m not in ("pointing", "mass")]
    assert "On the object" not in text_of(scored)
    again = score_methods(model, images_BCHW, None, ("attention",), steps=2)
    assert scored == again
    assert score_methods(model, images_BCHW, None, (), steps=2, seed=1)[0] != scored[1]


def test_lower_is_better_where_it_is() -> None:
    """A method below the controls beats them by deletion, above them by the others."""
    noise_B = torch.linspace(-0.01, 0.01, 20)

    def values(method: str, measure: str) -> Tensor:
        level = {"rollout": 0.2, "gradcam": 0.8, "center": 0.5}.get(method, 0.4)
        return level + noise_B * (1 if method in ("rollout", "gradcam") else -1)

    low, high, *controls = made_scores(values)
    for name, measure in MEASURES.items():
        assert low.beats[name] is not measure.higher_is_better
        assert high.beats[name] is measure.higher_is_better
    assert not low.beats_controls
    assert not any(control.beats_controls for control in controls)


def test_all_controls_must_be_beaten() -> None:
    def values(method: str, measure: str) -> Tensor:
        sign = 1 if MEASURES[measure].higher_is_better else -1
        level = {"rollout": 0.2, "gradcam": 0.05, "center": 0.1}.get(method, 0.0)
        return 0.5 + sign * level + torch.linspace(0, 0.01, 20)

    best, between, *_ = made_scores(values)
    assert best.beats_controls
    assert not any(between.beats.values())
    table = " ".join(text_of([best, between, *_]).split())
    assert "rollout beats all controls by every measure" in table
    assert "gradcam does not beat the controls by any measure" in table


def test_pointing_has_wilsons_interval() -> None:
    ones_B = torch.ones(20)
    estimate = made_scores(lambda method, measure: ones_B)[0].estimates["pointing"]
    assert estimate == pytest.approx((1, 0.8389, 1), abs=1e-4)


def test_the_table_states_its_intervals_and_tests(scores: list[Score]) -> None:
    table = text_of(scores)
    assert max(map(len, table.splitlines())) <= 80
    words = " ".join(table.split())
    for expected in ("random", "(control)", "center", "11 images", "95%", "paired t tests"):
        assert expected in words
    assert "does not beat the controls" in words


def test_no_number_is_cut_beside_the_longest_name(scores: list[Score]) -> None:
    longest = max(METHODS, key=len)
    named = [replace(score, method=longest) if not score.is_control else score for score in scores]
    estimates = {name: Estimate(0.5, -0.101, 0.899) for name in named[0].estimates}
    named[0] = replace(named[0], estimates=estimates)
    failing = Badge(longest, 0.5, 0.4, 0.6, False, False, False)
    table = text_of(named, Verdict("validation", 11, (failing,), ""))
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    assert table.count("-0.101–0.899") == len(MEASURES) - 2
    assert table.count("-10.1–89.9") == 2
    assert f"{longest} ✗" in table
    assert any(line.strip().startswith("(control)") for line in table.splitlines())


def test_curves_are_drawn_with_and_without_masks(tmp_path: Path, scores: list[Score]) -> None:
    plot_scores(tmp_path / "all.png", scores)
    with Image.open(tmp_path / "all.png") as picture:
        assert min(picture.size) > 800
    with pytest.raises(DataError, match="no score to draw"):
        plot_scores(tmp_path / "none.png", [])
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        plot_scores(tmp_path / "file" / "all.png", scores)


def test_the_ranking_shows_every_srg_and_what_methods_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(map_report, "save_figure", lambda figure, path: figures.append(figure))
    badges = (
        Badge("shapley", 0.6, 0.5, 0.7, True, True, True),
        Badge("rollout", -0.2, -0.3, -0.1, False, True, False),
    )
    controls = {"random": Estimate(0.0, -0.1, 0.1), "center": Estimate(0.2, 0.1, 0.3)}
    plot_ranking(tmp_path / "ranking.png", Verdict("validation", 1_234, badges, ""), controls)
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "shapley", "rollout", "random (control)", "center (control)",
    ]  # fmt: skip
    marks = [text.get_text() for text in axes.texts]
    assert marks[:2] == ["✓", "✗ control, class"]
    assert "no better than a control" in marks[2]
    points = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() in "oD"]
    assert points == [[0.6, 0], [-0.2, 1], [0.0, 2], [0.2, 3]]
    spans = [part.get_segments()[0][:, 0].tolist() for part in axes.collections]
    assert np.allclose(spans, [[0.5, 0.7], [-0.3, -0.1], [-0.1, 0.1], [0.1, 0.3]])
    assert [0.2, 0.2] in [list(line.get_xdata()) for line in axes.lines]
    low, high = axes.get_xlim()
    assert low < -0.3
    assert high >= 1
    assert "1,234 images" in axes.get_xlabel()


def test_what_cannot_be_scored_is_refused(model: VisionTransformer) -> None:
    images_BCHW = torch.zeros(10, 3, 12, 20)
    with pytest.raises(DataError, match="9 images are too few"):
        score_methods(model, images_BCHW[:9], None)
    with pytest.raises(DataError, match="9 masks for 10 images"):
        score_methods(model, images_BCHW, torch.zeros(9, 12, 20, dtype=torch.bool))
    with pytest.raises(ConfigError, match="steps is 0"):
        score_methods(model, images_BCHW, None, steps=0)
    with pytest.raises(DataError, match="2 maps for 1 masks"):
        pointing_game(torch.zeros(2, 3, 5), torch.zeros(1, 12, 20, dtype=torch.bool))


# The ceiling, and the size of the values


class Sum(nn.Module):
    """Log-odds that add up over the patches: each patch's own value while it is bright."""

    config = ModelConfig(image_size=(12, 20), n_classes=2, patch_size=4)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        patches_BGJ = nn.functional.avg_pool2d(images_BCHW[:, :1], 4)[:, 0]
        odds_B = (patches_BGJ * EFFECTS_GJ).sum((1, 2))
        return torch.stack([torch.zeros_like(odds_B), odds_B], dim=1)


EFFECTS_GJ = torch.arange(15.0).view(3, 5).sub(5).div(4)


def lit(count: int) -> Tensor:
    """Images whose patches have mean 0 and differ from it by different amounts."""
    patches = torch.rand(count, 1, 3, 5, generator=torch.Generator().manual_seed(3)) - 0.5
    patches -= patches.mean((2, 3), keepdim=True)
    return nn.functional.interpolate(patches, (12, 20)).expand(-1, 3, -1, -1)


def test_greedy_search_finds_the_best_order_of_effects_that_add_up() -> None:
    images_BCHW = lit(7)
    true_BGJ = nn.functional.avg_pool2d(images_BCHW[:, 0], 4) * EFFECTS_GJ
    classes_B = torch.ones(7, dtype=torch.long)
    found_BGJ = best_orders(Sum(), images_BCHW, classes_B, steps=15)  # type: ignore[arg-type]
    # The blur is another fill than the mean, so that the orders need not be equal.
    assert (found_BGJ.flatten(1).argmax(1) == true_BGJ.flatten(1).argmax(1)).float().mean() > 0.5
    one = best_orders(Sum(), images_BCHW[2:3], classes_B[:1], steps=15)  # type: ignore[arg-type]
    assert torch.equal(found_BGJ[2:3], one), "an image does not depend on its batch"
    assert found_BGJ.flatten(1).sort().values.tolist() == [[float(n) for n in range(-14, 1)]] * 7


def test_no_method_reaches_more_than_the_ceiling_here(
    model: VisionTransformer, scores: list[Score]
) -> None:
    images_BCHW = torch.randn(11, 3, 12, 20, generator=torch.Generator().manual_seed(5))
    ceiling = find_ceiling(model, images_BCHW, scores, steps=4)
    assert ceiling.n == 11
    assert set(ceiling.shares) == {score.method for score in scores}
    assert max(ceiling.shares.values()) < 1
    by_name = {score.method: score for score in scores}
    share = by_name["rollout"].estimates["srg"].mean / ceiling.srg.mean
    assert ceiling.shares["rollout"] == pytest.approx(share)
    table = text_of(scores, None, ceiling)
    assert "ceiling, 11 images" in table
    assert "ms per" in table


def test_true_effects_correlate_with_the_drop_and_the_size_of_a_set_does_not() -> None:
    images_BCHW = lit(9)
    classes_B = torch.ones(9, dtype=torch.long)
    hidden_KN = hidden_sets(15)
    assert (hidden_KN.sum(1) == 4).all()
    assert len(hidden_KN.unique(dim=0)) > 50
    drops_BK = logit_drops(Sum(), images_BCHW, classes_B, hidden_KN, chunk=5)  # type: ignore[arg-type]
    true_BGJ = nn.functional.avg_pool2d(images_BCHW[:, 0], 4) * EFFECTS_GJ
    for factor, expected in ((1, 1), (-3, -1), (0, 0)):
        maps_BGJ = true_BGJ * factor + 1
        found_B = faithfulness_correlation(maps_BGJ, hidden_KN, drops_BK)
        torch.testing.assert_close(found_B, torch.full((9,), float(expected), dtype=torch.float64))


def test_scores_are_those_of_the_last_layers_map_and_the_controls_are_what_they_say(
    model: VisionTransformer,
) -> None:
    images_BCHW = torch.randn(11, 3, 12, 20, generator=torch.Generator().manual_seed(5))
    classes_B = map_metrics.predict_classes(model, images_BCHW)
    maps = dict(map_metrics._all_maps(model, images_BCHW, ("attention",), classes_B, 0))
    last_BGJ = compute_maps(model, images_BCHW, MapSettings()).values_BLGJ[:, -1]
    assert torch.equal(maps["attention"], last_BGJ)
    random_BGJ = maps["random"]
    assert len(random_BGJ.unique()) == random_BGJ.numel()
    assert 0 <= random_BGJ.min() < 0.1 < 0.9 < random_BGJ.max() <= 1
    assert maps["blurred random"][0, 1, 2].item() == pytest.approx(
        random_BGJ[0, 0:3, 1:4].mean().item(), rel=1e-5
    )
    assert maps["blurred random"][0, 0, 0].item() == pytest.approx(
        random_BGJ[0, :2, :2].mean().item(), rel=1e-5
    )
    other = dict(map_metrics._all_maps(model, images_BCHW, (), classes_B, 1))["random"]
    assert not torch.equal(random_BGJ, other)
    (score, *_) = map_metrics.score_methods(model, images_BCHW, None, ("attention",), steps=4)
    drawn = deletion_insertion(model, images_BCHW, last_BGJ, classes_B, fill="mean", steps=4)
    assert score.estimates["deletion_mean"].mean == pytest.approx(drawn.areas()[0].mean().item())
