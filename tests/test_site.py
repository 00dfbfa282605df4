"""The site builds without warnings and without a network, and its pages fetch nothing from one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_NETWORK = """
import socket

def refuse(*arguments, **_):
    raise OSError(f"the network was used: {arguments[1:]}")

socket.socket.connect = socket.getaddrinfo = refuse
"""
FETCHED = re.compile(
    r'<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]*)'
)


@pytest.mark.slow
def test_it_builds_offline(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_nb", "pydata_sphinx_theme"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    site = tmp_path / "site/html"  # beside it, a folder of the notebooks' pictures is made
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    paths = [str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".",
         site],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {
        path.relative_to(site) for path in site.glob("**/*.html") if "_static" not in path.parts
    }
    assert {Path("index.html"), Path("docs/index.html"), Path("docs/faq.html")} <= pages
    for page in pages:
        text = (site / page).read_text(encoding="utf-8")
        assert not FETCHED.findall(text), page
        for link in re.findall(r'\b(?:src|href)="([^"#?:]+)["#?]', text):
            assert (site / page.parent / link).exists(), f"{page}: {link}"
    index = (site / "docs/index.html").read_text(encoding="utf-8")
    assert "only-dark" in index
    settings = (site / "docs/reference/settings.html").read_text(encoding="utf-8")
    assert "Side of the image in pixels" in settings
    commands = (site / "docs/reference/commands.html").read_text(encoding="utf-8")
    assert "usage: vitrail predict" in commands


def test_every_page_of_docs_is_in_the_lists_of_the_site() -> None:
    guides = (ROOT / "docs/how-to/index.md").read_text()
    for path in (ROOT / "docs/how-to").glob("*.md"):
        assert path.name == "index.md" or f"({path.name})" in guides, path


def test_the_drawing_is_what_its_script_draws() -> None:
    sys.path.insert(0, str(ROOT / "docs/pictures"))
    try:
        import architecture
    finally:
        sys.path.pop(0)
    for name, palette in {"": architecture.LIGHT, "-dark": architecture.DARK}.items():
        kept = (ROOT / f"docs/pictures/architecture{name}.svg").read_text()
        # Not the picture inside, whose bytes depend on the compressor.
        drawn, kept = (
            re.sub(r"base64,[^\"]+", "", text) for text in (architecture.draw(palette), kept)
        )
        assert drawn == kept, "run docs/pictures/architecture.py"
