"""The Dockerfile copies files that exist, and starts the server as the command line allows."""

import json
import re
from pathlib import Path

from vitrail.cli.parsing import parse
from vitrail.cli.serve import ServeOptions

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_it_copies_what_an_installation_needs() -> None:
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", TEXT, re.M) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', project, re.M)
    assert {"pyproject.toml", "requirements.txt", "src", *needed} <= set(copied)


def test_it_installs_the_tested_version_of_torch_and_a_python_that_is_allowed() -> None:
    pinned = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned is not None
    assert f" {pinned[0]} " in TEXT
    version = re.search(r"^FROM python:3\.(\d+)", TEXT, re.M)
    assert version is not None
    assert int(version[1]) >= 11


def test_it_serves_to_the_outside_without_a_browser() -> None:
    words = re.search(r"^ENTRYPOINT (.*)$", TEXT, re.M)
    assert words is not None
    program, command, *options = json.loads(words[1])
    assert (program, command) == ("vitrail", "serve")
    given = parse(ServeOptions, options, prog="vitrail serve")
    assert (given.host, given.no_browser) == ("0.0.0.0", True)
    assert f"EXPOSE {given.port}\n" in TEXT
