"""Tasks and demonstrations: from files, or from functions that make them."""

import importlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from actors.errors import RecipeError
from actors.row_images import PicturedRow, RowImage, without_parts
from schemas import names
from schemas.recipe import Data, Evaluation, Recipe
from schemas.task import TaskRow


def load_function(name: str, key: str, recipe_dir: str) -> Callable[..., Any]:
    """The function that `module:function` names. Raises RecipeError naming the recipe's key."""
    try:
        function = names.find(name, recipe_dir)
    except names.UnknownName as error:
        raise RecipeError("recipe", key, str(error)) from error
    except ImportError as error:
        raise RecipeError("recipe", key, f"cannot import {name!r}: {error}") from error
    if not callable(function):
        raise RecipeError("recipe", key, f"{name!r} is not a function")
    return function  # type: ignore[no-any-return]


def _row(value: Any, where: str, recipe_dir: str) -> TaskRow:
    images: tuple[RowImage, ...] = ()
    if isinstance(value, dict):
        value, images = without_parts(value, where, recipe_dir)
    try:
        row = value if isinstance(value, TaskRow) else msgspec.convert(value, TaskRow)
    except msgspec.ValidationError as error:
        raise RecipeError(where, "", f"{error}") from error
    return PicturedRow(**msgspec.structs.asdict(row), images=images) if images else row


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield msgspec.json.decode(line)
                except msgspec.DecodeError as error:
                    raise RecipeError(f"{path}:{number}", "", f"not JSON: {error}") from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(f"{path}", "", f"not Parquet: {error}") from error
    for batch in file.iter_batches():
        for value in batch.to_pylist():
            yield _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Parquet gives every struct every field; one that is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _hub(name: str) -> Iterator[Any]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        why = "hf: needs the package `datasets`: pip install datasets"
        raise RecipeError("recipe", "data.path", why) from error
    dataset, _, split = name.removeprefix("hf:").partition(":")
    for value in datasets.load_dataset(dataset, split=split or "train"):
        yield _without_nulls(dict(value))


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {".jsonl": _jsonl, ".parquet": _parquet}


def find_file(path: str, key: str, recipe_dir: str) -> Path:
    """A data file, relative to the recipe. Raises RecipeError naming the recipe's key."""
    file = Path(recipe_dir, path)
    if file.suffix not in _READERS:
        raise RecipeError("recipe", key, f"{path!r} is neither *.jsonl, *.parquet nor hf:…")
    if not file.is_file():
        raise RecipeError("recipe", key, f"{file} is not there")
    return file


def read_rows(path: str, key: str, recipe_dir: str) -> list[TaskRow]:
    """All rows of a file or a hub data set. Raises RecipeError naming the file and the row."""
    if path.startswith("hf:"):
        return [_row(value, f"{path} row {i}", recipe_dir) for i, value in enumerate(_hub(path), 1)]
    file = find_file(path, key, recipe_dir)
    values = _READERS[file.suffix](file)
    rows = [_row(value, f"{file} row {i}", recipe_dir) for i, value in enumerate(values, 1)]
    if not rows:
        raise RecipeError("recipe", key, f"{file} has no rows")
    return rows


def training_rows(data: Data, seed: int, recipe_dir: str) -> Iterator[TaskRow]:
    """Every task in the order of the run; the same for the same seed, so that a resume can skip ahead."""
    if data.rows:
        make = load_function(data.rows, "data.rows", recipe_dir)
        return _made(make, data, seed, recipe_dir)
    if not data.path:
        return iter(())  # nothing is trained
    return _epochs(read_rows(data.path, "data.path", recipe_dir), data.shuffle, seed)


def _made(make: Callable[..., Any], data: Data, seed: int, recipe_dir: str) -> Iterator[TaskRow]:
    """What the function gives; from its beginning again if that ends."""
    while True:
        row = None
        for number, value in enumerate(make(seed), 1):
            yield (row := _row(value, f"{data.rows} row {number}", recipe_dir))
        if row is None:
            raise RecipeError("recipe", "data.rows", f"{data.rows!r} gives no rows")


def _epochs(rows: list[TaskRow], shuffle: bool, seed: int) -> Iterator[TaskRow]:
    for epoch in itertools.count():
        order = list(rows)
        if shuffle:
            random.Random(f"{seed}.{epoch}").shuffle(order)
        yield from order


def evaluation_rows(evaluation: Evaluation, recipe: Recipe, recipe_dir: str) -> list[TaskRow]:
    """The held-out tasks; empty when the recipe has none."""
    if evaluation.rows:
        values = load_function(evaluation.rows, "evaluation.rows", recipe_dir)(recipe.seed)
        limited = itertools.islice(values, evaluation.limit)
        made = enumerate(limited, 1)
        return [_row(value, f"{evaluation.rows} row {i}", recipe_dir) for i, value in made]
    if evaluation.path:
        return read_rows(evaluation.path, "evaluation.path", recipe_dir)[: evaluation.limit]
    return []
