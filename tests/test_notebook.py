"""The notebook runs from top to bottom."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vitrail.config.files import from_json
from vitrail.config.settings import Config
from vitrail.training.run import Run

NOTEBOOK = Path(__file__).parents[1] / "visualize_attention_map.ipynb"


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_it_runs(tiny_run: Config, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    folder = tmp_path / "output" / "quick"
    folder.mkdir(parents=True)
    Run.start(from_json({}, tiny_run), folder).save()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/gif" in out.get("data", {}) for out in shown) == 2
    assert sum("image/png" in out.get("data", {}) for out in shown) == 2
    with Image.open(tmp_path / "rollout.gif") as image:
        assert image.n_frames > tiny_run.model.n_layers  # and the frames of the fades
    assert (tmp_path / "explanation.html").stat().st_size > 10_000
