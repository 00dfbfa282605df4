"""Run notebooks in place: ``docs/tutorial/run.py [NUMBER or FILE ...]``.

Edit a chapter in Jupyter or as text, then run this. It keeps what a reader sees and
drops the rest (times, versions, editors' notes), so that differences stay small.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
LARGE = 300_000
"""A PNG with more base64 characters than this becomes a JPEG."""


def main(*wanted: str) -> None:
    """Run the chapters with these numbers and these files. Default: all chapters."""
    chapters = sorted(FOLDER.glob("[0-9]-*.ipynb"))
    chosen = [path for path in chapters if path.name[0] in wanted or not wanted]
    for path in [*chosen, *(Path(name) for name in wanted if not name.isdecimal())]:
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute()
        clean(notebook)
        nbformat.write(notebook, path)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Keep text, code, outputs and tags; convert large pictures to JPEG."""
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            # Warnings contain local paths; the tests check them.
            cell.outputs = [
                output for output in cell.outputs if output.get("name") != "stderr"
            ]
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
            data = output.get("data", {})
            if len(data.get("image/png", "")) > LARGE:
                data["image/jpeg"] = to_jpeg(data.pop("image/png"))


def to_jpeg(png: str) -> str:
    """Convert a PNG to a JPEG, both in base64."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").save(file, "JPEG", quality=90, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main(*sys.argv[1:])
