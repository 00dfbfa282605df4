"""``vitrail explain --score``: which of the maps can be trusted."""

from typing import TYPE_CHECKING

from rich.progress import Progress

from vitrail.cli.console import err, out, say
from vitrail.cli.explain_options import ExplainOptions, list_methods

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier


def score(classifier: "Classifier", options: ExplainOptions) -> int:
    """Score methods on images of the model's data; write the numbers and a plot, print a table."""
    from vitrail.data.images import normalise
    from vitrail.explain.map_report import plot_scores, score_table
    from vitrail.explain.methods import METHODS
    from vitrail.explain.score import FLOORS, STEPS, score_methods
    from vitrail.runtime.files import write_json
    from vitrail.training.run import load_split
    from vitrail.training.run_folder import log_test_use_of

    split, folder = options.scoring.split, options.folder
    methods = list_methods(options.method) or METHODS
    images = load_split(classifier, split, **options.scoring.data).sample(options.scoring.images)
    if split == "test":
        note = log_test_use_of(classifier.source, folder, "vitrail explain --score", len(images))
        if note:
            say(note)
    say(f"scoring on {len(images)} {split} images of {classifier.config.data.dataset}")
    raw_BCHW = images.raw_BCHW.to(classifier.device)
    with Progress(console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task("scoring", total=STEPS * (len(methods) + len(FLOORS)))
        scores = score_methods(
            classifier.model,
            normalise(raw_BCHW, classifier.mean, classifier.std),
            images.masks_BHW,
            methods,  # type: ignore[arg-type]
            advance=lambda: progress.advance(task),
        )
    about = {"model": classifier.source, "split": split, "images": len(images)}
    write_json(folder / "scores.json", {**about, "scores": [each.to_json() for each in scores]})
    out.print(score_table(scores))
    plot_scores(folder / "scores.png", scores)
    say(f"scores.png and scores.json in {folder}/")
    return 0
