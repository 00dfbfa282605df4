"""Run the notebooks of this folder in place: ``docs/tutorial/run.py [NUMBER ...]``.

Edit a chapter in Jupyter or as text, then run this. It keeps what a reader sees and
drops the rest (times, versions, editors' notes), so that differences stay small.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def main(*numbers: str) -> None:
    """Run the chapters with these numbers. Default: all of them."""
    for path in sorted(FOLDER.glob("[0-9]-*.ipynb")):
        if numbers and path.name[0] not in numbers:
            continue
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(FOLDER)}},
        )
        client.execute()
        clean(notebook)
        nbformat.write(notebook, path)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Keep text, code, outputs and tags."""
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
            # Warnings name paths of this machine; the test shows them.
            cell.outputs = [
                output for output in cell.outputs if output.get("name") != "stderr"
            ]
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}


if __name__ == "__main__":
    main(*sys.argv[1:])
