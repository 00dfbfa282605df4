"""The tutorial's notebooks run from top to bottom, and are kept with what they show."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs/tutorial"
CHAPTERS = sorted(FOLDER.glob("[0-9]-*.ipynb"))
SMALL = {
    "EPOCHS": 1, "TRAINING_IMAGES": 200, "TEST_IMAGES": 40, "IMAGES": 10, "PICTURES": 6,
}  # fmt: skip
"""Values of the parameter cells for the default tests: the same lesson, with less data."""


SMALLER = """
from vitrail.data import shapes
from vitrail.explain import panels
shapes.COUNTS.update(train=400, test=100)
panels.SMALLEST_SIDE = 128
%config InlineBackend.print_figure_kwargs = {"bbox_inches": None, "dpi": 40}
"""
"""Data and pictures of the default tests."""


def read_cells(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return cells


def join(value: str | list[str]) -> str:
    """Return a text of a notebook, which may be a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def run(tmp_path: Path, parameters: dict[str, int]) -> None:
    """Run all chapters in one kernel, which saves five starts; each with its own names."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.v4.new_notebook()
    if parameters:
        notebook.cells.append(nbformat.v4.new_code_cell(SMALLER))
    for path in CHAPTERS:
        notebook.cells.append(nbformat.v4.new_code_cell("%reset -f"))
        for cell in read_cells(path):
            code = join(cell["source"]) if cell["cell_type"] == "code" else ""
            if "parameters" in cell["metadata"].get("tags", ()):
                code += "".join(f"\n{n} = {v}" for n, v in parameters.items() if f"{n} =" in code)
            if code:
                notebook.cells.append(nbformat.v4.new_code_cell(code))
    there = tmp_path / "docs/tutorial"
    there.mkdir(parents=True)
    (tmp_path / "examples").symlink_to(FOLDER.parents[1] / "examples")
    resources = {"metadata": {"path": str(there)}}
    nbclient.NotebookClient(notebook, timeout=1500, resources=resources).execute()
    warned = [
        join(output["text"])
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stderr"
    ]
    assert all("IProgress not found" in text for text in warned), warned  # of tqdm, if installed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.timeout(600)
def test_the_chapters_run(tmp_path: Path) -> None:
    run(tmp_path, SMALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_chapters_run_in_full(tmp_path: Path) -> None:
    run(tmp_path, {})


def test_there_are_six_in_order_and_each_leads_to_the_next() -> None:
    assert [path.name[0] for path in CHAPTERS] == list("123456")
    for path, following in pairwise(CHAPTERS):
        assert f"]({following.name})" in join(read_cells(path)[-1]["source"])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_kept_with_outputs_and_pictures(path: Path) -> None:
    cells = read_cells(path)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), "run docs/tutorial/run.py"
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run docs/tutorial/run.py"
    kinds = [kind for cell in code for output in cell["outputs"] for kind in output.get("data", ())]
    assert kinds.count("image/png") >= 2
    assert "<details><summary>Answers</summary>" in join(cells[-1]["source"])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_links_of_a_chapter_exist(path: Path) -> None:
    text = "".join(join(c["source"]) for c in read_cells(path) if c["cell_type"] == "markdown")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (FOLDER / link).exists(), link


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in CHAPTERS) < 2e6
