"""The tables of a record of map scores, in Markdown, from the scores.json of ``explain --score``.

python benchmarks/score_table.py records/map-scores-shapes/scores.json
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from vitrail.explain.map_metrics import CONTROLS
from vitrail.explain.stored_scores import Badge

Json = dict[str, Any]


def interval(found: Json) -> str:
    """Return a mean with its 95% interval."""
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def percent(found: Json | None) -> str:
    """Return a share with its 95% interval."""
    if found is None:
        return ""
    return f"{found['mean']:.1%} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def mark(found: Json) -> str:
    """Return ✓ for a measure by which a method beats all controls."""
    return " ✓" if found["beats_controls"] else ""


def score_rows(found: Json) -> list[list[str]]:
    """Return SRG, its difference from the next method's, correlation and share of the ceiling."""
    scores = sorted(found["scores"], key=lambda score: -score["measures"]["srg"]["mean"])
    methods = [score["method"] for score in scores if score["method"] not in CONTROLS]
    after = dict(pairwise(methods))
    rows = [["method", "SRG", "above the next method", "correlation", "of the ceiling", "ms"]]
    for score in scores:
        name, srg = score["method"], score["measures"]["srg"]
        correlation = score["measures"]["correlation"]
        rows.append([
            name if name in methods else f"{name} (control)",
            interval(srg) + mark(srg),
            interval(found["differences"][name][after[name]]) if name in after else "",
            f"{correlation['mean']:.3f}{mark(correlation)}",
            f"{found['ceiling']['shares'][name]:.1%}",
            f"{score['milliseconds']:.1f}" if name in methods else "",
        ])  # fmt: skip
    ceiling = found["ceiling"]
    rows.append([f"ceiling, {ceiling['n']} images", interval(ceiling["srg"]), "", "", "100%", ""])
    return rows


def test_rows(found: Json) -> list[list[str]]:
    """Return the results of the other tests, and which of them a method fails."""
    measures = {score["method"]: score["measures"] for score in found["scores"]}
    checks = {check["method"]: check for check in found["checks"]}
    on_object = [name for name in ("pointing", "mass") if name in found["scores"][0]["measures"]]
    titles = {"pointing": "pointing game", "mass": "inside the object"}
    rows = [["method", "in the tile of its class", "weights randomized",
             *(titles[name] for name in on_object), "fails"]]  # fmt: skip
    for badge in (Badge(**badge) for badge in found["badges"]):
        check = checks[badge.method]
        shown = [measures[badge.method][name] for name in on_object]
        rows.append([
            badge.method,
            percent(check["in_tile"]),
            f"{list(check['similarity'].values())[-1]['mean']:.2f}",
            *(percent(each) + mark(each) for each in shown),
            ", ".join(badge.failures),
        ])  # fmt: skip
    return rows


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |".replace("  ", " ") for cells in lines)


def several_rows(reports: dict[str, Json]) -> list[list[str]]:
    """Return the SRG of each method on several models; ✗ for one that fails a test."""
    srg: dict[str, dict[str, str]] = {}
    for model, found in reports.items():
        failing = {badge["method"] for badge in found["badges"] if Badge(**badge).failures}
        for score in found["scores"]:
            name, mean = score["method"], score["measures"]["srg"]["mean"]
            srg.setdefault(name, {})[model] = f"{mean:.3f}{' ✗' if name in failing else ''}"
    head = ["method", *reports]
    return [head, *([name, *(means.get(m, "") for m in reports)] for name, means in srg.items())]


def main(paths: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Print the tables, the differences of SRG between all methods, and the verdict.

    Args:
        paths: one or more scores.json files.
    """
    reports = {str(path.parent.name): json.loads(path.read_text()) for path in paths}
    if len(reports) > 1:
        print(table(several_rows(reports)))
        return
    (found,) = reports.values()
    print(f"{found['images']} {found['split']} images; ✓: better than all controls.\n")
    print(table(score_rows(found)), table(test_rows(found)), found["trust"], sep="\n\n")
    print("\nDifferences of SRG, image by image:\n")
    for higher, lowers in found["differences"].items():
        for lower, difference in lowers.items():
            if lower not in CONTROLS and higher not in CONTROLS:
                print(f"- {higher} minus {lower}: {interval(difference)}")


if __name__ == "__main__":
    tyro.cli(main)
