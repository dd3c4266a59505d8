"""Tasks from files and from functions, good and bad."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.data import evaluation_rows, load_function, read_rows, training_rows
from actors.errors import RecipeError
from schemas.recipe import Data, Evaluation, Policy, Recipe
from schemas.task import ChatMessage, PublicPart, TaskRow


def row(name: str = "a", **more: Any) -> dict[str, Any]:
    public = {"messages": [{"role": "user", "content": "?"}], "extra": {"table": [1, 2]}}
    return {"id": name, "public": public, "private": {"answer": "42"}} | more


def write(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def refused(path: str, folder: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        read_rows(path, "data.path", str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_a_file(tmp_path: Path, suffix: str) -> None:
    """Relative to the recipe, in their order, in both parts."""
    path = write(tmp_path / f"tasks{suffix}", row("a"), row("b"))
    rows = read_rows(path.name, "data.path", str(tmp_path))
    assert [each.id for each in rows] == ["a", "b"]
    assert rows[0] == TaskRow(
        id="a",
        public=PublicPart(
            messages=[ChatMessage(role="user", content="?")], extra={"table": [1, 2]}
        ),
        private={"answer": "42"},
    )
    assert read_rows(str(path), "data.path", "") == rows, "an absolute path is as good"


def test_a_field_that_is_null_in_parquet_was_not_there(tmp_path: Path) -> None:
    """Parquet gives each row every field that any row has."""
    write(tmp_path / "t.parquet", row("a"), row("b", private={"tests": ["x"]}))
    first, second = read_rows("t.parquet", "data.path", str(tmp_path))
    assert first.private == {"answer": "42"}
    assert second.private == {"tests": ["x"]}


def test_blank_lines_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(f"\n{json.dumps(row())}\n\n")
    assert len(read_rows("t.jsonl", "data.path", str(tmp_path))) == 1


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"public": {"messages": []}}, "missing required field `id`"),
        (row(id=3), "Expected `str`, got `int` - at `$.id`"),
        (row(answer="42"), "unknown field `answer`"),
        (row(public={"messages": [], "answer": "42"}), "unknown field `answer` - at `$.public`"),
        (row(public={"messages": [{"role": "robot", "content": ""}]}), "$.public.messages[0].role"),
        (row(public={"messages": [{"role": "user"}]}), "`content` - at `$.public.messages[0]`"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_bad_row_is_named_with_its_field(
    tmp_path: Path, bad: dict[str, Any], says: str, suffix: str
) -> None:
    """The file, the row and the path in it: a private key that was put elsewhere must not travel in public."""
    if suffix == ".parquet":
        write(tmp_path / "t.parquet", bad)
        number = 1
    else:
        write(tmp_path / "t.jsonl", row(), bad)
        number = 2
    message = refused(f"t{suffix}", tmp_path)
    assert message.startswith(f"{tmp_path}/t{suffix} row {number}: ")
    assert says in message


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    """By file and line."""
    (tmp_path / "t.jsonl").write_text(json.dumps(row()) + "\n\n{'id': 1}\n")
    assert refused("t.jsonl", tmp_path).startswith(f"{tmp_path}/t.jsonl:3: not JSON: ")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("no")
    assert refused("t.parquet", tmp_path).startswith(f"{tmp_path}/t.parquet: not Parquet: ")


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """With the recipe's key."""
    assert refused("t.csv", tmp_path) == (
        "recipe: data.path: 't.csv' is neither *.jsonl, *.parquet nor hf:…"
    )
    assert refused("t.jsonl", tmp_path) == f"recipe: data.path: {tmp_path}/t.jsonl is not there"
    (tmp_path / "t.jsonl").touch()
    assert refused("t.jsonl", tmp_path) == f"recipe: data.path: {tmp_path}/t.jsonl has no rows"


@given(st.binary(max_size=80))
def test_any_bytes_are_rows_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """As a user error, in one line."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.jsonl").write_bytes(data)
    assert refused("any.jsonl", folder)


# -- the order of a run ----------------------------------------------------------------------------


def ids(data: Data, seed: int, folder: Path, count: int) -> list[str]:
    return [each.id for each in itertools.islice(training_rows(data, seed, str(folder)), count)]


def test_the_order_is_the_seed_s(tmp_path: Path) -> None:
    """The same for the same seed, another in each epoch, every row once an epoch."""
    write(tmp_path / "t.jsonl", *(row(f"{i}") for i in range(20)))
    data = Data(path="t.jsonl")
    two_epochs = ids(data, 1, tmp_path, 40)
    assert two_epochs == ids(data, 1, tmp_path, 40)
    assert two_epochs[:20] != two_epochs[20:]
    assert sorted(two_epochs[:20]) == sorted(two_epochs[20:]) == sorted(map(str, range(20)))
    assert ids(data, 2, tmp_path, 20) != two_epochs[:20]
    plain = ids(Data(path="t.jsonl", shuffle=False), 1, tmp_path, 40)
    assert plain == [str(i) for i in range(20)] * 2


# -- functions -------------------------------------------------------------------------------------

MODULE = """
def rows(seed):
    for i in range(3):
        yield {"id": f"{seed}.{i}", "public": {"messages": []}}

def bad(seed):
    yield {"id": "a", "public": {"messages": [], "answer": 42}}

def none(seed):
    return []

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module beside the recipe, under a name that nobody else has."""
    import sys

    name = f"tasks_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def test_rows_of_a_function_are_made_by_seed(tmp_path: Path, module: str) -> None:
    """Found beside the recipe; what it has no more of comes again."""
    assert ids(Data(rows=f"{module}:rows"), 7, tmp_path, 5) == ["7.0", "7.1", "7.2", "7.0", "7.1"]


def test_a_function_s_bad_row_is_named(tmp_path: Path, module: str) -> None:
    with pytest.raises(RecipeError, match=rf"{module}:bad row 1: .*`answer` - at `\$\.public`"):
        ids(Data(rows=f"{module}:bad"), 7, tmp_path, 1)


def test_a_function_without_rows_is_named(tmp_path: Path, module: str) -> None:
    with pytest.raises(RecipeError, match=rf"data\.rows: '{module}:none' gives no rows"):
        ids(Data(rows=f"{module}:none"), 7, tmp_path, 1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rows", "'rows': it is not `module:function`"),
        (":rows", "it is not `module:function`"),
        ("{module}:", "it is not `module:function`"),
        (".{module}:rows", "it is not `module:function`"),
        ("no_such_module:rows", "no module 'no_such_module'"),
        ("{module}:row", "has no attribute 'row'"),
        ("{module}:number", "is not a function"),
    ],
)
def test_a_function_that_is_not_there_is_named(
    tmp_path: Path, module: str, name: str, says: str
) -> None:
    """With the recipe's key."""
    with pytest.raises(RecipeError) as caught:
        load_function(name.format(module=module), "data.rows", str(tmp_path))
    assert str(caught.value).startswith("recipe: data.rows: ")
    assert says in str(caught.value)


def test_held_out_rows_are_limited(tmp_path: Path, module: str) -> None:
    """From a file or a function; none where the recipe has none."""
    recipe = Recipe(policy=Policy(model="m"), seed=4)
    write(tmp_path / "t.jsonl", row("a"), row("b"), row("c"))
    for evaluation, expected in (
        (Evaluation(path="t.jsonl", limit=2), ["a", "b"]),
        (Evaluation(rows=f"{module}:rows", limit=2), ["4.0", "4.1"]),
        (Evaluation(), []),
    ):
        rows = evaluation_rows(evaluation, recipe, str(tmp_path))
        assert [each.id for each in rows] == expected
