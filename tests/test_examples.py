"""The scripts in examples/ are short, and run."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

from vitrail.config.files import from_json
from vitrail.training.run import Run

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_at_most_25_lines(path: Path) -> None:
    assert path.read_text().count("\n") <= 25


def test_classify(
    tiny_run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "run").mkdir()
    run = Run.start(from_json({}, tiny_run), tmp_path / "run")  # type: ignore[arg-type]
    run.save()
    Image.effect_noise((50, 40), 90).save(tmp_path / "a.png")
    script = Path(__file__).parents[1] / "examples/classify.py"
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "run"), str(tmp_path / "a.png")])
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(str(tmp_path / "a.png"))
    assert first.count("%") == 3
    assert "(1, 3, 17, 17)" in last


def test_classify_without_words_says_how_to_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[1] / "examples/classify.py"
    monkeypatch.setattr("sys.argv", [""])
    with pytest.raises(SystemExit, match=r"^Classify pictures in Python: ``python examples/cl"):
        runpy.run_path(str(script), run_name="__main__")
