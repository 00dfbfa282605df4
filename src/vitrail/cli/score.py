"""``vitrail explain --score``: which maps to trust, as tables, plots and numbers."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from vitrail.cli.console import out, print_err, progress_bar
from vitrail.cli.options import DataOptions, load_labeled, log_test_use
from vitrail.errors import OutputError
from vitrail.runtime.files import write_json

if TYPE_CHECKING:
    from vitrail.explain.best_order import Ceiling
    from vitrail.explain.map_metrics import Score
    from vitrail.explain.map_settings import MapSettings, Method
    from vitrail.explain.sanity import Sanity, Shortcut
    from vitrail.explain.stored_scores import Verdict
    from vitrail.inference.classifier import Classifier


def score(
    classifier: "Classifier",
    chosen: "Sequence[Method | MapSettings]",
    data: DataOptions,
    count: int,
    folder: Path,
    *,
    as_json: bool = False,
) -> int:
    """Score methods on images of the model's data; write numbers and plots, print tables or JSON.

    If all methods are scored (by default they are), the verdict is also stored beside the weights.
    """
    from vitrail.data.images import normalize
    from vitrail.explain.best_order import find_ceiling
    from vitrail.explain.map_metrics import CONTROLS, STEPS, score_methods
    from vitrail.explain.map_settings import METHODS
    from vitrail.explain.recommendation import judge
    from vitrail.explain.sanity import check_methods

    methods = chosen or METHODS
    # Some tests take the first images, but those of a folder are sorted by class.
    images = load_labeled(classifier, data).sample(count).shuffled()
    log_test_use(classifier, data.split, folder, "vitrail explain --score", len(images))
    dataset = data.dataset or classifier.config.data.dataset
    print_err(f"scoring on {len(images)} {data.split} images of {dataset}")
    raw_BCHW = images.raw_BCHW.to(classifier.device)
    images_BCHW = normalize(raw_BCHW, classifier.mean, classifier.std)
    steps = STEPS * (len(methods) + len(CONTROLS)) + len(methods) + 2
    with progress_bar("scoring", steps) as move:
        advance = partial(move, 1)
        model, masks_BHW, labels_B = classifier.model, images.masks_BHW, images.labels_B
        scores = score_methods(model, images_BCHW, masks_BHW, methods, advance=advance)
        ceiling = find_ceiling(model, images_BCHW, scores)
        advance()
        checks = check_methods(model, images_BCHW, labels_B, methods, advance=advance)
        shortcut = _check_shortcut(classifier, data, count, methods)
        advance()
    verdict = judge(data.split, scores, checks)
    numbers = _numbers(classifier, verdict, scores, checks, ceiling, shortcut)
    _write(folder, numbers, verdict, scores, checks)
    if as_json:
        print(json.dumps(numbers))
    else:
        out.print(_tables(verdict, scores, checks, ceiling, shortcut))
    if set(METHODS) <= set(methods):
        _store(classifier, verdict, folder)
    return 0


def _check_shortcut(
    classifier: "Classifier",
    data: DataOptions,
    count: int,
    methods: "Sequence[Method | MapSettings]",
) -> "Shortcut | None":
    """Return how well the maps show the mark, if the model was trained with one."""
    from vitrail.data.images import normalize
    from vitrail.explain.sanity import check_shortcut

    if not classifier.config.data.shortcut or data.dataset not in (None, "shapes"):
        return None
    images = load_labeled(classifier, data, shortcut=0.0).sample(count)

    def prepare(raw_BCHW: Any) -> Any:
        return normalize(raw_BCHW.to(classifier.device), classifier.mean, classifier.std)

    return check_shortcut(classifier.model, images, prepare, methods)


def _numbers(
    classifier: "Classifier",
    verdict: "Verdict",
    scores: "Sequence[Score]",
    checks: "Sequence[Sanity]",
    ceiling: "Ceiling",
    shortcut: "Shortcut | None",
) -> dict[str, Any]:
    """Return everything that was measured as JSON values."""
    from vitrail.explain.map_metrics import paired_differences
    from vitrail.explain.stored_scores import to_json

    differences = paired_differences(scores)
    return {
        "model": classifier.source,
        **to_json(verdict, classifier.model),
        "ceiling": ceiling.to_json(),
        "shortcut": shortcut and shortcut.to_json(),
        "scores": [each.to_json() for each in scores],
        "differences": {
            name: {lower: difference._asdict() for lower, difference in found.items()}
            for name, found in differences.items()
        },
        "checks": [each.to_json() for each in checks],
    }


def _write(
    folder: Path,
    numbers: dict[str, Any],
    verdict: "Verdict",
    scores: "Sequence[Score]",
    checks: "Sequence[Sanity]",
) -> None:
    """Write the numbers and plots."""
    from vitrail.explain.map_report import plot_randomization, plot_ranking, plot_scores

    write_json(folder / "scores.json", numbers)
    controls = {score.method: score.estimates["srg"] for score in scores if score.is_control}
    plot_ranking(folder / "ranking.png", verdict, controls)
    plot_scores(folder / "scores.png", scores)
    plot_randomization(folder / "randomization.png", checks)
    print_err(f"ranking.png, scores.png, randomization.png and scores.json in {folder}/")


def _tables(
    verdict: "Verdict",
    scores: "Sequence[Score]",
    checks: "Sequence[Sanity]",
    ceiling: "Ceiling",
    shortcut: "Shortcut | None",
) -> RenderableType:
    """Return all tables, and which map to trust."""
    from vitrail.explain.map_report import sanity_table, score_table, shortcut_table, trust_text

    parts = [score_table(scores, verdict, ceiling), sanity_table(checks)]
    parts += [shortcut_table(shortcut)] if shortcut else []
    return Group(*(each for part in parts for each in (part, "")), trust_text(verdict))


def _store(classifier: "Classifier", verdict: "Verdict", folder: Path) -> None:
    """Store the verdict beside the weights, unless it is there already or cannot be written."""
    from vitrail.explain.stored_scores import to_json
    from vitrail.weights import bundled
    from vitrail.weights.pretrained import scores_path

    path = scores_path(classifier.source)
    if path is None or classifier.source in bundled.names():
        return
    if path.absolute() != (folder / "scores.json").absolute():
        try:
            write_json(path, to_json(verdict, classifier.model))
        except OutputError as error:
            print_err(f"vitrail: the verdict could not be stored beside the model: {error}")
            return
    print_err(f"{path}: shown by vitrail info and on pages of this model")
