"""The README is true: its links, commands, flags and map of the files."""

import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.cli.reference import run_test

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip() for line in README.splitlines() if line.startswith("    ")
]
"""The indented lines; shell commands among them begin with a program."""


def test_it_is_short_and_begins_with_a_command() -> None:
    lines = README.splitlines()
    assert len(lines) < 150
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("    "))
    assert first <= 25


DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "records/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_exist(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
    for link in links:
        if not link.startswith("http"):
            assert ((ROOT / name).parent / link).exists(), link


def test_lines_of_documents_are_at_most_120_characters() -> None:
    for name in DOCUMENTS:
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            assert len(line) <= 120, f"{name}:{number}"


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_scripts_and_imports_in_documents_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for path in re.findall(r"`(?:python |bash )?([\w.-]+/[\w./-]+\.(?:py|sh))\b", text):
        places = (ROOT, ROOT / "src/vitrail", (ROOT / name).parent)
        assert any((place / path).exists() for place in places), path
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for line in re.findall(r"^(?:from vitrail|import ).*", code, re.MULTILINE):
            exec(line, {})


def test_the_set_up_is_two_commands() -> None:
    assert "pip install -r requirements.txt && vitrail train --preset quick" in COMMANDS
    assert "pip install -r requirements-dev.txt && pytest" in COMMANDS


def test_the_badges_are_true() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    badges = dict(re.findall(r"badge/(\w+)-([\w.+]+)-\w+\)", README))
    torch = next(name for name in project["dependencies"] if name.startswith("torch>="))
    assert badges == {
        "python": project["requires-python"].removeprefix(">=") + "+",
        "pytorch": torch.removeprefix("torch>=") + "+",
        "license": project["license"],
    }


def test_pictures_exist_for_light_and_dark_pages() -> None:
    sources = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert len(sources) >= 4
    for source in sources:
        assert (ROOT / source).is_file(), source
        dark = re.sub(r"(?:-dark)?(\.\w+)$", r"-dark\1", source)
        assert (ROOT / dark).is_file(), dark


def test_the_first_lines_draw_the_animation_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    install, *lines = COMMANDS[:3]
    assert install == "pip install -r requirements.txt"
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    said = re.search(r"predicts: (cat), (\d+\.\d%)", README)
    assert said is not None
    assert re.search(rf"cat.jpg +│ {said[1]} {said[2]}", capsys.readouterr().out)
    frames = []
    for path in (tmp_path / "cat.gif", ROOT / "docs/pictures/cat.gif"):
        with Image.open(path) as animation:
            animation.seek(animation.n_frames - 1)
            frames.append(np.asarray(animation.convert("RGB")).astype(int))
    assert np.abs(frames[0] - frames[1]).mean() < 2


def test_the_map_of_the_files_names_every_module_and_no_other() -> None:
    source = ROOT / "src/vitrail"
    text = (ROOT / "docs/architecture.md").read_text()
    drawn = text.partition("## Map of the files")[2].partition("└── cli/")[0]
    drawn = re.sub(r"\([^)]*\)", "", drawn.replace("│", " "), flags=re.DOTALL)
    packages = re.findall(r"├── (\w+)/([^├]*)", drawn)
    listed = {
        (package, word) for package, words in packages for word in re.split(r"[\s,;:]+|and ", words)
    }
    listed = {(package, word.strip("/")) for package, word in listed if word}
    there = {
        (path.parent.name, path.name.removesuffix(".py"))
        for path in source.glob("*/*")
        if path.parent.name not in ("cli", "__pycache__") and path.name[0] not in "_."
    }
    assert listed ^ there == set()
    assert {path.name for path in source.iterdir() if path.is_dir()} - {"__pycache__"} == {
        *(package for package, _ in packages), "cli",
    }  # fmt: skip


def test_the_files_that_it_points_out_exist() -> None:
    lines = README.partition("## Where to find what\n\n")[2].partition("\n\n")[0].splitlines()
    folder, found = ROOT, 0
    for line in lines:
        place, _, words = line.strip().partition("  ")
        folder = folder if line.startswith("     ") else ROOT / place
        for name in re.findall(r"(\w+\.py)\b", words if folder.is_dir() else ""):
            assert (folder / name).is_file(), name
            found += 1
    assert found >= 10


def flags_by_command() -> dict[str, dict[str, str]]:
    """Return the flags in the indented lines of all documents: command -> flag -> document."""
    found: dict[str, dict[str, str]] = {}
    for name in DOCUMENTS:
        text = (ROOT / name).read_text().replace("\\\n", " ")
        for line in re.findall(r"^    (\S.*)", text, re.MULTILINE):
            line = line.partition(" #")[0]
            command = re.search(r"\bvitrail +(\w+) |python ((?:train|test)\.py) ", f"{line} ")
            if command:
                flags = re.findall(r" (--\w[\w-]*)", line[command.start() :])
                for flag in flags:
                    found.setdefault(command[1] or command[2], {})[flag.replace("-", "_")] = name
                found.setdefault(command[1] or command[2], {})
    return found


FLAGS = flags_by_command()


def show_help(command: str) -> None:
    """Print the help of a command, in this process."""
    if command == "test.py":
        run_test(["--help"])
    main(["train" if command == "train.py" else command, "--help"])


@pytest.mark.parametrize("command", FLAGS)
def test_flags_in_documents_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        show_help(command)
    assert end.value.code == 0
    shown = capsys.readouterr().out.replace("-", "_")
    for flag, name in FLAGS[command].items():
        assert re.search(rf"(?<!\w){flag}(?!\w)", shown), f"{name}: {command} has no {flag}"


def test_the_citation_is_of_this_version() -> None:
    import vitrail

    assert f"version: {vitrail.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_command_is_documented() -> None:
    assert set(FLAGS) >= {"train", "test", "predict", "explain", "inspect", "sweep", "export"}


@pytest.mark.slow
def test_the_first_command_ends_in_three_minutes(
    vitrail: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    began = time.perf_counter()
    done = vitrail("train", "--preset", "quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 180
    accuracy = re.search(r"test +│ +([\d.]+)%", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) >= 95


@pytest.mark.slow
def test_the_python_in_it_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    words = shlex.split("train --preset quick --epochs 1 --num_train_images 200 --n_layers 1")
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    trained = [sys.executable, "-m", "vitrail", *words]
    subprocess.run(trained, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("cat", "dog"):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        for number in range(30):
            picture = Image.effect_noise((40, 30), 90).convert("RGB")
            picture.save(tmp_path / "my_images" / name / f"{number}.png")
    run = [sys.executable, "-c", code]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True)
