"""The notebook about any ViT and any arrays runs without weights, and is kept with its outputs."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/how-to/any-vit.ipynb"
SMALL = '\nWEIGHTS, IMAGE_SIZE, EPOCHS = "not there", 112, 1\n'


def test_it_is_kept_with_outputs_of_the_published_weights() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) <= 12
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [output for cell in code for output in cell["outputs"]]
    kinds = [kind for output in shown for kind in output.get("data", {}) if "image" in kind]
    assert kinds == [*4 * ["image/jpeg"], "image/png"]
    text = json.dumps(shown)
    assert "Classifier('dinov2-small', 0 classes, 22.1M parameters, 518 x 518, cpu)" in text
    assert not any(word in text for word in ("/root/", "/home/", "Warning"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.timeout(600)
def test_it_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    for name in ("ipykernel", "sklearn", "transformers"):
        pytest.importorskip(name, exc_type=ImportError)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    setup = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    given, _, fallback = setup.source.partition("\nif not Path(WEIGHTS)")
    setup.source = f"{given}{SMALL}if not Path(WEIGHTS){fallback}"
    there = tmp_path / "docs/how-to"
    there.mkdir(parents=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    resources = {"metadata": {"path": str(there)}}
    nbclient.NotebookClient(notebook, timeout=500, resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 5
    text = "".join(output.get("text", "") for output in shown if output.get("name") == "stdout")
    assert "digits.npz 1457 images, 10 classes\ndigits 1457 images, 10 classes" in text
    assert (there / "cat.html").stat().st_size < 5_000_000
