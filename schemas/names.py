"""What a name in a recipe stands for: something built in, from an installed package, or `module:function`."""

import difflib
import importlib
import re
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

_PLACE = re.compile(r"[^\W\d][\w.]*:\w+")


class UnknownName(LookupError):
    """A name that leads nowhere; says why, and what would be close."""


def find(
    name: str, recipe_dir: str = "", *, built_in: Mapping[str, str] | None = None, group: str = ""
) -> Any:
    """What the name stands for. Modules are looked up in `recipe_dir` too.

    `built_in`: names to `module:function`. `group`: the entry points of installed packages that count as well.
    Raises UnknownName; an error inside a module that is there comes out as it is.
    """
    known = {entry.name: entry.value for entry in entry_points(group=group)} if group else {}
    known |= built_in or {}
    place = name if ":" in name else known.get(name, "")
    if not _PLACE.fullmatch(place):
        close = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        named = known and ":" not in name
        raise UnknownName(
            f"{name!r}: {hint if named else 'it is not `module:function` of a file beside the recipe'}"
        )
    module, _, attribute = place.partition(":")
    if recipe_dir and recipe_dir not in sys.path:
        sys.path.append(recipe_dir)
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise UnknownName(f"{name!r}: no module {error.name!r}") from error
        raise
    except AttributeError as error:
        raise UnknownName(f"{name!r}: {error}") from error
