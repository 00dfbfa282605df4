"""Which map to trust: the tests of all methods in one sentence."""

from collections.abc import Sequence

import torch

from vitrail.explain.map_metrics import Score, significantly_above_zero
from vitrail.explain.map_settings import CLASSLESS
from vitrail.explain.sanity import Sanity
from vitrail.explain.stored_scores import Badge, Verdict

TIE_ERROR = 0.05
"""A method is on a par with the best one unless a paired test with this error rate rejects it."""


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
            # Also if there were no mosaics to show it.
            score.method not in CLASSLESS and by_method[score.method].depends_on_class,
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
    ties = [score.method for score in others if not _is_worse(score, best)]
    how_many = f"of the {len(passed)} methods that pass" if others else "and the only one to pass"
    text = f"Trust {best.method} on this model: the highest SRG {how_many} every test"
    if ties:
        verb = "are" if len(ties) > 1 else "is"
        text += f"; {' and '.join(filter(None, [', '.join(ties[:-1]), ties[-1]]))} {verb} on a par"
    return text + "."


def _is_worse(score: Score, best: Score) -> bool:
    """Return whether a method's SRG is significantly below the best, image by image."""
    gains_B = torch.tensor(best.srg_B) - torch.tensor(score.srg_B)
    return significantly_above_zero(gains_B, TIE_ERROR)
