"""What users are told to install."""

import re
from pathlib import Path

import vitrail

REPOSITORY = Path(__file__).parents[1]
FILES = [
    *Path(vitrail.__file__).parent.rglob("*.py"),
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").rglob("*.md"),
    *REPOSITORY.glob("*.ipynb"),
]


def test_nobody_is_told_to_install_the_package_from_an_index() -> None:
    """The name belongs to somebody else there: only a clone of the repository is ours."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip3? install\s+(-U\s+)?['\"]?vitrail\b", text), path
        for extra in re.findall(r"pip install .*?\[(\w+)\]", text):
            assert f'pip install -e ".[{extra}]"' in text, path
