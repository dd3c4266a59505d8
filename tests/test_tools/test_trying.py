"""`actors tools`: what a person sees."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tools.registry import BUILT_IN

EXAMPLES = Path(__file__).parents[2] / "examples"


def tools(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "actors", "tools", *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_the_tools_are_listed(tmp_path: Path) -> None:
    """Function by function, with the tool and what is special about it; `mcp` has none until it has servers."""
    done = tools(tmp_path, "list")
    assert done.returncode == 0, done.stderr
    listed = {line.partition("  ")[0] for line in done.stdout.splitlines()}
    assert {*BUILT_IN, "repo: view", "repo: submit"} - {"repo"} <= listed
    assert "(ends the trajectory)" in done.stdout


def test_a_schema_is_shown(tmp_path: Path) -> None:
    """As the policy is shown it: names, types, and what each argument means."""
    done = tools(tmp_path, "schema", "sql")
    function = json.loads(done.stdout)["function"]
    assert function["name"] == "sql"
    assert function["parameters"]["required"] == ["query"]
    assert function["parameters"]["properties"]["query"]["description"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("call", "python", "print(6*7)"), 0, "42"),
        (("call", "python", '{"code": "6*7"}'), 0, "42"),
        (("call", "python", "1/0"), 1, "ZeroDivisionError"),
        (("call", "python", '{"cod": "1"}'), 1, "Wrong arguments for python"),
        (("call", "finish", "forty-two"), 0, "forty-two"),
        (("call", "pyton", "1"), 2, "did you mean python?"),
        (("call", "python", '{"code": 1'), 2, "not a JSON object"),
        (("call", "sql", "SELECT 1"), 2, "no `database`"),
        (("call", "python", "1", "--set", "tools.timeuot_s=3"), 2, "did you mean 'timeout_s'?"),
        (("call", "search", "x", "--set", "tools.options.search.corpse=x"), 2, "corpse"),
        (("schema", "nowhere:tool"), 2, "no module 'nowhere'"),
        (("call", "mcp", "x"), 2, "nothing to call"),
    ],
)
def test_a_tool_is_called_by_hand(
    tmp_path: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    """What the policy would see, and 0; 1 for its own mistake; 2 and one line for the caller's."""
    done = tools(tmp_path, *arguments, *(("--set", "tools.tier=unsafe") * (arguments[0] == "call")))
    assert done.returncode == status, done.stderr + done.stdout
    assert says in (done.stderr if status == 2 else done.stdout)
    assert len(done.stderr.splitlines()) <= 1


def test_a_recipe_gives_tools_and_options(tmp_path: Path) -> None:
    """And the place where their names are looked up."""
    with sqlite3.connect(tmp_path / "shop.db") as link:
        link.execute("CREATE TABLE book AS SELECT 7 AS id")
    link.close()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "policy.model = 'm'\nlearner.steps = 0\n[tools]\nuse = ['sql']\ntier = 'unsafe'\n"
        "[tools.options.sql]\ndatabases = { shop = 'shop.db' }\n"
    )
    at = ("--recipe", str(recipe))
    assert tools(EXAMPLES, "list", *at).stdout.startswith("sql  Run one SQL query")
    done = tools(
        EXAMPLES, "call", "sql", "SELECT id FROM book", "--task", '{"database": "shop"}', *at
    )
    assert done.stdout == "id\n--\n7\n(1 row)\n", done.stderr
