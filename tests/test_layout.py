"""What must stay true of the tree itself. The import contracts are lint-imports', run by `make lint`."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
    "wheel"
]["packages"]
SOURCES = sorted(path for name in OURS for path in (ROOT / name).rglob("*.py"))
ALL = sorted(
    path for name in (*OURS, "tests", "bench", "examples") for path in (ROOT / name).rglob("*.py")
)

files = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_packages_are_the_folders() -> None:
    """Every top-level folder with a package in it is in the wheel, but for what measures it."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders - {"bench"} == set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_nobody_else_owns_our_names(name: str) -> None:
    """They are generic: another distribution's `tools` in the same environment would be imported instead."""
    owners = packages_distributions().get(name, [])
    assert set(owners) <= {"agentic-actors"}, f"also installed by {owners}"


def test_the_distribution_is_kept_off_public_indexes() -> None:
    """And has a name of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "agentic-actors"
    assert "Private :: Do Not Upload" in project["classifiers"]


def test_tests_are_no_package() -> None:
    """pytest imports them by path."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("module", ["actors.cli", "actors.joining", "schemas.events", "bus.work"])
def test_the_command_line_starts_without_what_it_does_not_need(module: str) -> None:
    """torch and its kin take seconds; only the processes that train and sample import them."""
    heavy = {"torch", "transformers", "numpy", "pyarrow", "matplotlib", "tensorboardX", "datasets"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_helper_lives_with_its_caller() -> None:
    """No drawer for whatever has no place."""
    drawers = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
    parts = {part for path in SOURCES for part in (*path.relative_to(ROOT).parts, path.stem)}
    assert parts & drawers == set()


def test_one_file_catches_everything() -> None:
    """With its reason; elsewhere an `except` names what it expects, or lets it go on.

    cell.py is no part of any process of ours: hostile code raises anything there, and ends as in any interpreter.
    """
    catching = {path.relative_to(ROOT).as_posix() for path in SOURCES if _catches_everything(path)}
    assert catching - {"tools/sandbox/cell.py"} == {"actors/process.py"}


def _catches_everything(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
            goes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if not goes_on and (node.type is None or names & {"Exception", "BaseException"}):
                return True
    return False


def test_nothing_is_pickled() -> None:
    """Wire: msgpack. Weights: safetensors."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}, path


@files
def test_a_file_is_short(path: Path) -> None:
    """400 lines are the aim; a few more are left for the day."""
    assert len(path.read_text().splitlines()) <= 420


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_is(path: Path) -> None:
    """In its first line."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert len(docstring.splitlines()[0]) <= 120


@files
def test_no_place_of_one_machine_is_written_down(path: Path) -> None:
    """Paths and hosts come from recipes, arguments and the environment."""
    text = path.read_text()
    for folder in ("home", "root", "work", "Users"):
        assert f"/{folder}/" not in text
