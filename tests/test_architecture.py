"""Architecture rules: import order, sizes, no duplicates, light imports, public names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitrail

SOURCE = Path(vitrail.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(SOURCE.rglob("*.py"))
ORDER = [
    "errors", "runtime", "config", "data", "model", "evaluation", "explain",
    "inference", "weights", "training", "sweep", "serve", "cli", "__main__",
]  # fmt: skip
"""Each package may import from itself and from those before it."""


def package_of(path: Path) -> str:
    """The package (or top-level module) that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_packages(tree: ast.AST) -> set[str]:
    """The packages of vitrail that a file imports from, anywhere in it."""
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names = {
        a.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module == "vitrail"
        for a in n.names
    }
    return names | {m.split(".")[1] for m in modules if m.startswith("vitrail.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    if path == SOURCE / "__init__.py":
        pytest.skip("the package's own file names everything, lazily")
    here = ORDER.index(package_of(path))
    for other in imported_packages(ast.parse(path.read_text())):
        assert ORDER.index(other) <= here, f"{package_of(path)} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 50, f"{node.name} is too long"
            arguments = [*node.args.posonlyargs, *node.args.args]
            named = [a for a in arguments if a.arg not in ("self", "cls")]
            assert len(named) + len(node.args.kwonlyargs) <= 7, f"{node.name} takes too many"


def test_few_files_lie_outside_of_packages() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= 5


def statements(path: Path) -> list[str]:
    """The lines of a file without imports, signatures and blank lines."""
    text = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.FunctionDef):
            skipped.update(range(node.lineno, node.body[0].lineno))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return [line for number, line in lines if line and number not in skipped]


def test_no_six_lines_occur_in_two_files() -> None:
    first: dict[tuple[str, ...], Path] = {}
    for path in FILES:
        lines = statements(path)
        for start in range(len(lines) - 5):
            block = tuple(lines[start : start + 6])
            other = first.setdefault(block, path)
            pair = frozenset({str(p.relative_to(SOURCE)) for p in (path, other)})
            assert len(pair) == 1, f"{set(pair)} share:\n" + "\n".join(block)


def defined_names(tree: ast.Module) -> set[str]:
    """The names that a module itself defines at the top level."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_names_are_imported_from_the_module_that_defines_them() -> None:
    defined = {path: defined_names(ast.parse(path.read_text())) for path in FILES}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitrail."):
                base = SOURCE.joinpath(*node.module.split(".")[1:])  # type: ignore[union-attr]
                module = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
                for name in node.names:
                    is_module = (base / name.name).is_dir() or (base / f"{name.name}.py").exists()
                    assert is_module or name.name in defined[module], f"{path}: {name.name}"


def test_functions_of_one_file_begin_with_an_underscore() -> None:
    folders = ("src", "tests", "benchmarks", "tools", "docs", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    words = {
        path: set(re.findall(r"\w+", path.read_text())) for path in [*paths, *ROOT.glob("*.py")]
    }
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
                users = [other for other in words if other != path and node.name in words[other]]
                assert users, f"{path}: {node.name} is used in no other file"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                private = [name.name for name in node.names if name.name.startswith("_")]
                assert not private, f"{path} imports {private}"


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, vitrail, vitrail.cli, vitrail.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_sorted_and_there() -> None:
    assert vitrail.__all__ == sorted(vitrail.__all__) == dir(vitrail)
    for name in vitrail.__all__:
        assert getattr(vitrail, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        vitrail.nothing_like_this  # noqa: B018
