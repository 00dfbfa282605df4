"""Installation instructions for extras."""

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


def test_no_instruction_installs_the_package_from_an_index() -> None:
    """The package is not published there: it is installed from a clone."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip3? install\s+(-U\s+)?['\"]?vitrail\b", text), path
        for extra in re.findall(r"pip install .*?\[(\w+)\]", text):
            assert f'pip install -e ".[{extra}]"' in text, path
