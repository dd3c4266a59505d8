"""The engine that a recipe asks for."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from engines.engine import Engine
from engines.errors import EngineError
from schemas.recipe import Generator, Policy


def open_engine(config: Generator, policy: Policy, folder: Path, recipe_dir: str) -> Engine:
    """Open the engine on a Hugging Face folder; `module:function` is looked up in `recipe_dir` too.

    A script may have an attribute `seconds_per_token`. torch is imported here, not before. Raises EngineError.
    """
    if config.engine == "scripted":
        from engines.scripted import ScriptedEngine

        script = _function(config.script, recipe_dir)
        pace = getattr(script, "seconds_per_token", 0.0)
        return ScriptedEngine.open(folder, script, seconds_per_token=pace)
    from engines.transformers_engine import TransformersEngine

    return TransformersEngine.open(
        folder,
        dtype=policy.dtype,
        slots=config.slots,
        threads=config.threads,
        weight_swap=config.weight_swap,
    )


def _function(name: str, recipe_dir: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise EngineError("bad_script", f"{name!r} is not module:function")
    if recipe_dir not in sys.path:
        sys.path.append(recipe_dir)
    try:
        function = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise EngineError("bad_script", f"{name}: {error}") from error
    found: Callable[..., Any] = function
    return found
