"""Names that a program for VerlTool may use without importing them.

Its Python runs eighteen star imports before each program, and policies have learned to rely on them. Here a program is
given just those names of them that it mentions and does not bind itself; it may still bind them anew, like any name.
"""

import builtins
import importlib
import re

_STARS = (
    *("typing", "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math"),
    *("random", "statistics", "itertools", "functools", "operator", "io", "sys", "json"),
)
_MODULES = _STARS[1:]
"""Imported by their own names too, after the stars."""

_NAME = re.compile(r"(?<![.\w])[A-Za-z_]\w*")
_BOUND = re.compile(
    r"^\s*(?:from|import)\b(.*)$"  # every word of it
    r"|\b(?:def|class|for|as)\s+(\w+)"
    r"|^\s*(\w+)\s*=(?!=)",
    re.MULTILINE,
)


def _provided() -> dict[str, str]:
    """Name → the statement that imports it; a later star wins, but typing's names are the last resort."""
    statements: dict[str, str] = {}
    for module in _STARS:
        found = importlib.import_module(module)
        public = [name for name in vars(found) if not name.startswith("_")]
        names = getattr(found, "__all__", public)
        statements |= {name: f"from {module} import {name}" for name in names}
    statements |= {module: f"import {module}" for module in _MODULES}
    return {name: each for name, each in statements.items() if not hasattr(builtins, name)}


_PROVIDED = _provided()


def with_imports(code: str) -> str:
    """The program after a line that imports what it takes for granted; as it is when that is nothing."""
    if "__future__" in code:  # that must come first
        return code
    bound = {name for groups in _BOUND.findall(code) for name in _NAME.findall(" ".join(groups))}
    mentioned = sorted(set(_NAME.findall(code)) & _PROVIDED.keys() - bound)
    return f"{'; '.join(_PROVIDED[name] for name in mentioned)}\n{code}" if mentioned else code
