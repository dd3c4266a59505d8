"""A tool from the text of a Python file: every replica runs just this text, wherever it is."""

import hashlib
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from tools.registry import load_tools
from tools.tool import Tool


def load_source(function: str, source: str, options: Mapping[str, Any]) -> Tool:
    """The tool that a function of the source is, with its options.

    The source runs in this process, once however often it is asked for. Raises ToolError, and what the source raises.
    """
    name = f"tool_source_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        with ExitStack() as undo:
            undo.callback(sys.modules.pop, name)
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)
            undo.pop_all()
    return load_tools([f"{name}:{function}"], "", {function: options} if options else {})[function]
