"""Which map to trust: the tests of all methods in one sentence."""

from collections.abc import Sequence

from vitrail.explain.map_metrics import Score, paired_difference
from vitrail.explain.map_settings import CLASSLESS, read_variant
from vitrail.explain.sanity import Sanity
from vitrail.explain.stored_scores import Badge, Verdict


def judge(split: str, scores: Sequence[Score], checks: Sequence[Sanity]) -> Verdict:
    """Return what the scores and checks of the same methods say."""
    by_method = {check.method: check for check in checks}
    methods = [score for score in scores if not score.is_control]
    methods.sort(key=lambda score: -score.estimates["srg"].mean)
    badges = tuple(
        Badge(
            score.method,
            *score.estimates["srg"],
            score.beats["srg"],
            by_method[score.method].depends_on_model,
            # Classless methods fail even if there were no mosaics to test this.
            read_variant(score.method).method not in CLASSLESS
            and by_method[score.method].depends_on_class,
        )
        for score in methods
    )
    return Verdict(split, methods[0].n, badges, _sentence(badges, methods))


def _sentence(badges: Sequence[Badge], scores: Sequence[Score]) -> str:
    """Return which map to trust; both in descending order of SRG."""
    passed = [s for b, s in zip(badges, scores, strict=True) if not b.failures]
    if not passed:
        return "Trust none of these maps on this model: each fails at least one test."
    best, *others = passed
    # On a par: the 95% interval of the paired difference includes 0.
    ties = [score.method for score in others if paired_difference(best, score).low <= 0]
    kinds = "methods and variants" if any(":" in s.method for s in passed) else "methods"
    why = f"the highest SRG of the {len(passed)} {kinds} that pass every test"
    text = f"Trust {best.method} on this model: "
    text += why if others else "the only method that passes every test"
    if ties:
        verb = "are" if len(ties) > 1 else "is"
        text += f"; {' and '.join(filter(None, [', '.join(ties[:-1]), ties[-1]]))} {verb} on a par"
    return text + "."
