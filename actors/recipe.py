"""Recipes from TOML: read, override, check."""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from actors.errors import RecipeError
from learner.combination import contradictions, formula
from schemas.recipe import Recipe, Tools

_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_WITH_PASSWORD = re.compile(r"://[^/\s@:]*:[^/\s@]+@")
_SECRET_KEY = re.compile(
    r"(?i)tools\.options\.mcp\.servers\..*\.(headers|env)\..*(auth|key|token|secret|cookie|pass).*"
)
_MISSING = re.compile(r"Object missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_AT = re.compile(r"(.*?) - at `\$\.?([^`]*)`$")

NO_POLICY = (
    *('policy.model=""', "learner.steps=0"),
    *('data.rows=""', 'data.path=""', 'evaluation.rows=""', 'evaluation.path=""'),
)
"""Overrides: of a recipe, perhaps for training, only the tools are used."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides. Raises RecipeError."""
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise RecipeError(str(path), "", error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), "", f"not TOML: {error}") from error
    for override in overrides:
        _override(tables, override)
    recipe = _convert(tables, str(path))
    _check(recipe, str(path))
    return recipe if recipe.name else msgspec.structs.replace(recipe, name=path.stem)


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with some keys changed, each as `key=value`. Raises RecipeError."""
    tables = msgspec.to_builtins(recipe)
    for override in overrides:
        _override(tables, override)
    changed = _convert(tables, "--set")
    _check(changed, "--set")
    return changed


def tools_without_recipe(overrides: Sequence[str] = ()) -> Tools:
    """The defaults of the `tools` table with `tools.key=value` overrides. Raises RecipeError."""
    tables: dict[str, Any] = {"policy": {"model": ""}}
    for override in overrides:
        _override(tables, override)
    return _convert(tables, "--set").tools


def _override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError("--set", override, "write key=value, e.g. learner.steps=20")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.split(".")
    table = tables
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError("--set", key, f"{section} is not a table")
    table[last] = value


def _convert(tables: dict[str, Any], where: str) -> Recipe:
    try:
        return msgspec.convert(tables, Recipe)
    except msgspec.ValidationError as error:
        message = str(error)
        if unknown := _UNKNOWN.match(message):
            name, section = unknown[1], unknown[2] or ""
            key = f"{section}.{name}" if section else name
            raise RecipeError(where, key, f"no such key{_hint(section, name)}") from error
        if missing := _MISSING.match(message):
            key = f"{missing[2]}.{missing[1]}" if missing[2] else missing[1]
            raise RecipeError(where, key, "missing: it has no default") from error
        if at := _AT.match(message):
            raise RecipeError(where, at[2], at[1] + _choices(at[2])) from error
        raise RecipeError(where, "", message) from error


def _hint(section: str, name: str) -> str:
    table: Any = Recipe
    for part in section.replace("[...]", "[]").split(".") if section else ():
        fields = {field.name: field.type for field in msgspec.structs.fields(table)}
        table = fields.get(part.removesuffix("[]"), Recipe)
        table = get_args(table)[-1] if part.endswith("[]") else table
    known = [field.name for field in msgspec.structs.fields(table)]
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


def _choices(key: str) -> str:
    kind: Any = Recipe
    for part in key.split("."):
        kind = next(
            (field.type for field in msgspec.structs.fields(kind) if field.name == part), None
        )
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            break
    return f": one of {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else ""


def _check_values(recipe: Recipe, where: str) -> None:
    """No key may have these."""
    for key, value in _leaves("", msgspec.to_builtins(recipe)):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(where, key, f"must be finite, not {value}")
        if isinstance(value, str) and _is_secret(key, value):
            why = "a secret: a recipe is in the log, for all to read; where a tool takes it, write env:NAME"
            raise RecipeError(where, key, f"{why} and set that variable")


def _check(recipe: Recipe, where: str) -> None:
    """What types alone cannot say."""
    _check_values(recipe, where)
    for section, table in (("data", recipe.data), ("evaluation", recipe.evaluation)):
        if table.path and table.rows:
            raise RecipeError(where, f"{section}.path", f"give it or {section}.rows, not both")
    if not (recipe.data.path or recipe.data.rows) and recipe.learner.steps:
        raise RecipeError(where, "data.path", "no tasks: give it or data.rows")
    if recipe.cold_start.steps and not recipe.cold_start.demonstrations:
        raise RecipeError(where, "cold_start.demonstrations", "cold_start.steps needs it")
    shown = recipe.tools.show != "none" or recipe.tools.format == "template"
    if recipe.cold_start.steps and shown:
        why = 'demonstrations do not show tools: put them into the messages, with show = "none"'
        raise RecipeError(where, "tools.show", why)
    if recipe.generator.engine == "scripted" and not recipe.generator.script:
        raise RecipeError(where, "generator.script", "the scripted engine needs it")
    for key, fix in contradictions(recipe):
        raise RecipeError(where, f"learner.{key}", fix)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is no table and no list, with the key that it stands under."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}" if key else name, item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(key, item)
    else:
        yield key, value


def _is_secret(key: str, value: str) -> bool:
    """A password within a URL, unless in words about a tool, or what opens an MCP server's door."""
    if _SECRET_KEY.fullmatch(key):
        return not value.startswith("env:")
    return not key.endswith((".listed", ".description")) and bool(_WITH_PASSWORD.search(value))


def sentence(recipe: Recipe) -> str:
    """The loss that the recipe amounts to, as a comment of TOML."""
    return f"# {formula(recipe)}\n"


def to_toml(recipe: Recipe) -> str:
    """The recipe as resolved, every key written out; reads back equal."""
    return "\n".join(_lines("", recipe)) + "\n"


def _lines(path: str, table: msgspec.Struct) -> Iterator[str]:
    """A table's keys, then the tables within it."""
    values = {field.name: getattr(table, field.name) for field in msgspec.structs.fields(table)}
    for key, value in values.items():
        if value is not None and not isinstance(value, msgspec.Struct):
            yield f"{key} = {_toml(value)}"
    for key, value in values.items():
        if isinstance(value, msgspec.Struct):
            inner = f"{path}.{key}" if path else key
            yield from ("", f"[{inner}]", *_lines(inner, value))


def _toml(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        pairs = (f"{_toml(key)} = {_toml(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    # a JSON string, number, boolean or list of these is TOML as it stands, but for one character
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
