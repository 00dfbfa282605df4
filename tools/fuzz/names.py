"""Untrusted names of classes and files: in tables, JSON, CSV, pages, pictures, errors."""

import contextlib
import csv
import html.parser
import io
import itertools
import json
import os
import re
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from fuzz.engine import Target, require
from vitrail.cli import console, predict
from vitrail.cli.explain import ExplainOptions, name_files
from vitrail.cli.predict import PredictOptions, print_answers
from vitrail.config.settings import DataConfig
from vitrail.data.datasets import load_data
from vitrail.data.formats import find_pictures
from vitrail.errors import DataError
from vitrail.evaluation.metrics import CalibrationBin, Metrics
from vitrail.evaluation.report import confusion_table, drawable, metrics_table, plot_confusion
from vitrail.explain.page import PageData, make_page
from vitrail.inference.predictions import Prediction, Ranking
from vitrail.runtime.files import write_json

SEEN = re.compile(r"[^\n\t]")


def require_harmless(text: str, where: str) -> None:
    """Require that a text contains no control or bidirectional formatting characters."""
    bad = {
        c for c in SEEN.findall(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }
    require(not bad, f"{where} contains {bad!r}")


def attack_classes(data: bytes, folder: Path) -> None:
    """Write two classes and a picture with these names to every kind of output."""
    text = data.decode("utf-8", errors="surrogateescape")
    names = (*([*text.split("\x00"), "b", "c"])[:2], text[:255])
    metrics = make_metrics(names[:2])
    shown = io.StringIO()
    printer = Console(file=shown, width=79, force_terminal=False, highlight=False)
    printer.print(metrics_table(metrics), confusion_table(metrics))
    require_harmless(shown.getvalue(), "a table")
    write_json(folder / "metrics.json", metrics.to_json())
    read = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    require([row["class"] for row in read["per_class"]] == list(names[:2]), "JSON changes names")
    ranking = Ranking([Prediction(names[0], 0.75), Prediction(names[1], 0.25)])
    check_answers([(names[2], ranking)])
    check_page(names)
    require_harmless(drawable(text, 99), "a picture")
    if len(data) % 512 == 7:
        plot_confusion(metrics, names[2], folder / "confusion.png")
    error = DataError(f"{names[2]}: no such class {names[0]}")
    require(str(error).isprintable(), "an error of more than one line")


def make_metrics(classes: tuple[str, ...]) -> Metrics:
    """Return metrics of two classes."""
    bins = (CalibrationBin(0.0, 1.0, 1.0, 0.75, 0.75),)
    return Metrics(
        classes=classes,
        images=4,
        accuracy=0.75,
        accuracy_interval=(0.3, 0.95),
        loss=0.5,
        top5_accuracy=None,
        expected_calibration_error=0.0,
        calibration_error_before=0.0,
        temperature=1.0,
        smoothing=0.0,
        macro_precision=0.75,
        macro_recall=0.75,
        precision_Y=(0.5, 1.0),
        recall_Y=(1.0, 0.7),
        support_Y=(1, 3),
        confusion_YY=((1, 0), (1, 2)),
        calibration=bins,
    )


def check_answers(answers: list[tuple[str, Ranking]]) -> None:
    """Print predictions as a table, JSON and CSV, and read them back."""
    texts = {}
    for form in ("table", "json", "csv"):
        shown = io.StringIO()
        printer = Console(file=shown, width=79, force_terminal=False, highlight=False)
        options = PredictOptions(json=form == "json", csv=form == "csv")
        with contextlib.redirect_stdout(shown):
            predict.out, before = printer, predict.out
            try:
                print_answers(answers, options)
            finally:
                predict.out = before
        texts[form] = shown.getvalue()
        require_harmless(texts[form], form)
        texts[form].encode("utf-8")
    parsed = [
        (each["picture"], [p["class"] for p in each["predictions"]])
        for each in json.loads(texts["json"])
    ]
    require(
        parsed == [(name, [p.name for p in top]) for name, top in answers], "JSON changes names"
    )
    rows = list(csv.reader(io.StringIO(texts["csv"])))
    require(len(rows) == 1 + sum(len(top) for _, top in answers), "CSV has a wrong number of rows")
    cells = [cell for row in rows for cell in row if len(cell) > 1]
    require(not any(cell[0] in "=+-@" for cell in cells), "CSV contains a formula")


class Tags(html.parser.HTMLParser):
    """The tags and attributes of a page, and the text of its title and data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[object] = []
        self.texts: dict[str, str] = {}
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = dict(attributes).get("id") or tag
        self.tags.append((tag, [pair for pair in attributes if pair[0] != "content"]))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


def make_html(names: tuple[str, ...]) -> str:
    """Return the page of two classes and a picture with these names."""
    ones_LATT = np.full((1, 1, 4, 4), 0.25, np.float32)
    data = PageData(
        Image.open(io.BytesIO(picture())),
        (0, 0, 4, 4),
        (2, 2),
        False,
        names[:2],
        np.array([0.0, 1.0]),
        np.zeros((1, 2)),
        ones_LATT,
        {},
        names[2],
    )
    return make_page(data).decode()


@cache
def picture() -> bytes:
    """Return a small PNG."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


@cache
def plain_tags() -> tuple[str, ...]:
    """Return the tags of a page with harmless names."""
    return tuple(map(str, Tags(make_html(("a", "b", "cat.png"))).tags))


def check_page(names: tuple[str, ...]) -> None:
    """Require that names change only the text of the page, not its tags."""
    page = make_html(names)
    require_harmless(page, "a page")
    tags = Tags(page)
    require(tuple(map(str, tags.tags)) == plain_tags(), "a name became a tag")
    predictions = json.loads(tags.texts["data"])["predictions"][-1]
    require(len(predictions) == 2, "a page with wrong classes")


def attack_files(data: bytes, folder: Path) -> None:
    """Use a folder of pictures with these names as a dataset, and the names in output files."""
    names = [
        part[:200]
        for part in data.replace(b"\0", b"").split(b"/")
        if part not in (b"", b".", b"..")
    ]
    made = []
    root = os.fsencode(folder / "pictures")
    for number, name in enumerate(([*names, b"a", b"b"])[:3]):
        inner = os.path.join(root, name[:100])  # noqa: PTH118 (bytes)
        os.makedirs(inner, exist_ok=True)  # noqa: PTH103
        for file in (name + b".png", b"%d.png" % number):
            made.append(os.path.join(inner, file))  # noqa: PTH118
            with open(made[-1], "wb") as opened:  # noqa: PTH123
                opened.write(picture())
    try:
        use_files(folder, [os.fsdecode(path) for path in made])
    finally:
        for path in made:
            if os.path.exists(path):  # noqa: PTH110
                os.remove(path)  # noqa: PTH107
        for inner in os.listdir(root):  # noqa: PTH208
            os.rmdir(os.path.join(root, inner))  # noqa: PTH106, PTH118
        for path in folder.glob("*.json"):
            path.unlink()


def use_files(folder: Path, made: list[str]) -> None:
    """Load the folder as a dataset, and its files as pictures to classify and explain."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        console.err, before = Console(file=printed, width=79, highlight=False), console.err
        try:
            for path in made:
                console.print_err(f"vitrail: {path}: cannot be read")
        finally:
            console.err = before
    require_harmless(printed.getvalue(), "an error message")
    found = find_pictures([str(folder / "pictures")])
    check_answers([(str(path), Ranking([Prediction(path.parent.name, 1.0)])) for path in found])
    for path in name_files(
        ExplainOptions(output_path=folder / "out"), [path.name for path in found]
    ):
        inside = os.path.abspath(path).startswith(f"{folder}/out/")  # noqa: PTH100
        require(inside and path.parent == folder / "out", f"{path!r} is outside the folder")
    config = DataConfig(dataset="folder", data_path=folder / "pictures")
    images = load_data(config, ["train"], image_hw=(4, 4)).images["train"]
    write_json(folder / "classes.json", list(images.classes))
    read = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    require(read == list(images.classes), "JSON changes the names of classes")


HARMFUL = (
    "cat",
    "a\x1b[31mb",
    "\x9b2J",
    "a\nb",
    "\r",
    "\x07",
    "\u202eabc",
    "\u2028",
    "\ufeff",
    "\ud800",
    "\udce9",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&amp;",
    "'\"><b>",
    "{{DATA}}",
    "]]>",
    "<!--",
    "[red]x[/]",
    "[/]",
    "[link=http://x]y",
    "$\\frac{a",
    "$x$",
    "%s{0}",
    "=1+1",
    "+1",
    "-x",
    "--help",
    "@a",
    "\t=1",
    "-",
    "",
    " ",
    ".",
    "..",
    "...",
    "~",
    "*",
    "[a-z]",
    "a" * 255,
    "é" * 60,
    "日本語",
    "👩‍👩‍👧",
    "a,b",
    'a"b',
    "a;b",
    "CON",
    "x" * 9_000,
    "y " * 9_000,
    "\\",
    "\\n",
    "C:\\x",
)


def names_seeds() -> list[bytes]:
    """Return single names and pairs."""
    ends = [name.encode("utf-8", errors="surrogatepass") for name in HARMFUL]
    return [b"cat\0dog", *ends, *(a + b"\0" + b for a, b in itertools.pairwise(ends))]


def files_seeds() -> list[bytes]:
    """Return names of folders and files."""
    ends = [name.encode("utf-8", errors="surrogatepass") for name in HARMFUL]
    return [
        b"cat/dog",
        *(a + b"/" + b for a, b in itertools.pairwise(ends)),
        b"\xe9/\xff\xfe",
    ]


CLASSES = Target("class names", names_seeds, attack_classes)
FILES = Target("file names", files_seeds, attack_files)
