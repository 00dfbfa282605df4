"""``vitrine explain --score``: which of the maps can be believed."""

from typing import TYPE_CHECKING

from vitrine.cli.console import out, say
from vitrine.cli.explain_options import ExplainOptions, list_methods

if TYPE_CHECKING:
    from vitrine.predict import Classifier


def score(classifier: "Classifier", options: ExplainOptions) -> int:
    """Score methods on images of the model's data; print a table, write a plot and the numbers."""
    from vitrine.data.images import normalise
    from vitrine.explain.methods import METHODS
    from vitrine.explain.score import score_methods
    from vitrine.explain.score_report import plot_scores, score_table
    from vitrine.files import write_json
    from vitrine.run import load_split
    from vitrine.run_folder import log_test_use

    split = options.scoring.split
    images = load_split(classifier, split).sample(options.scoring.images)
    folder = options.folder
    if split == "test":
        log_test_use(folder, "explain --score", len(images))
    say(f"scoring on {len(images)} {split} images of {classifier.config.data.dataset}")
    raw_BCHW = images.raw_BCHW.to(classifier.device)
    scores = score_methods(
        classifier.model,
        normalise(raw_BCHW, classifier.mean, classifier.std),
        images.masks_BHW,
        list_methods(options.method) or METHODS,  # type: ignore[arg-type]
    )
    out.print(score_table(scores))
    about = {"model": classifier.source, "split": split, "images": len(images)}
    write_json(folder / "scores.json", {**about, "scores": [each.to_json() for each in scores]})
    plot_scores(folder / "scores.png", scores)
    say(f"scores.png and scores.json in {folder}/")
    return 0
