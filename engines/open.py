"""The engine that a recipe asks for."""

from importlib.util import find_spec
from pathlib import Path

from engines.engine import Engine
from engines.errors import EngineError
from schemas import names
from schemas.recipe import Generator, Policy


def open_engine(config: Generator, policy: Policy, folder: Path, recipe_dir: str) -> Engine:
    """Open the engine on a Hugging Face folder; `module:function` is looked up in `recipe_dir` too.

    A script may have an attribute `seconds_per_token`. torch is imported here, not before. Raises EngineError.
    """
    if config.engine == "scripted":
        from engines.scripted import ScriptedEngine

        try:
            script = names.find(config.script, recipe_dir)
        except names.UnknownName as error:
            raise EngineError("bad_script", str(error)) from error
        pace = getattr(script, "seconds_per_token", 0.0)
        return ScriptedEngine.open(folder, script, seconds_per_token=pace)
    if config.engine == "vllm":
        if find_spec("vllm") is None:
            raise EngineError("not_installed", "needs vLLM: pip install vllm==0.32.0")
        from engines.vllm_engine import VllmEngine

        return VllmEngine.open(
            folder,
            dtype=policy.dtype,
            slots=config.slots,
            threads=config.threads,
            context=policy.max_tokens,
            weight_swap=config.weight_swap,
        )
    from engines.transformers_engine import TransformersEngine

    return TransformersEngine.open(
        folder,
        dtype=policy.dtype,
        slots=config.slots,
        threads=config.threads,
        weight_swap=config.weight_swap,
    )
