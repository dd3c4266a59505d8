"""Looks up every name of a recipe before anything is started: a misspelt one costs a second and not a run."""

from importlib.util import find_spec
from pathlib import Path

from msgspec.structs import replace

from actors.data import find_file, load_function
from actors.errors import RecipeError
from schemas.recipe import Learner, Recipe


def check_names(recipe: Recipe, recipe_dir: str) -> None:
    """Raises RecipeError for the first that leads nowhere. Imports what it names, but no torch of its own."""
    scripted = recipe.generator.engine == "scripted"
    for key, name in (
        ("data.rows", recipe.data.rows),
        ("evaluation.rows", recipe.evaluation.rows),
        ("cold_start.demonstrations", recipe.cold_start.demonstrations),
        ("generator.script", recipe.generator.script if scripted else ""),
    ):
        if name:
            load_function(name, key, recipe_dir)
    for key, path in (("data.path", recipe.data.path), ("evaluation.path", recipe.evaluation.path)):
        if path and not path.startswith("hf:"):
            find_file(path, key, recipe_dir)
    if recipe.generator.engine == "vllm" and find_spec("vllm") is None:
        raise RecipeError("recipe", "generator.engine", "needs vLLM: pip install vllm==0.32.0")
    _check_ranks(recipe.learner)
    _check_tools(recipe, recipe_dir)
    _check_model(recipe.policy.model, recipe_dir)


def _check_ranks(learner: Learner) -> None:
    if learner.deepspeed and find_spec("deepspeed") is None:
        key = "learner.ranks" if learner.ranks > 1 else "learner.offload"
        raise RecipeError("recipe", key, "needs DeepSpeed: pip install deepspeed==0.19.8")
    if learner.hostfile and not Path(learner.hostfile).is_file():
        raise RecipeError("recipe", "learner.hostfile", f"no file {learner.hostfile!r}")


async def resolve_tools(recipe: Recipe, recipe_dir: str) -> Recipe:
    """The recipe with what its tools ask once for the whole run. Raises RecipeError."""
    from tools.errors import ToolError
    from tools.registry import load_tools, resolve_options
    from tools.tool import Place

    options = recipe.tools.options
    try:
        tools = load_tools(recipe.tools.use, recipe_dir, options)
        found = await resolve_options(tools, Place(recipe_dir=recipe_dir))
    except ToolError as error:
        raise RecipeError("recipe", "tools.options", error.detail) from error
    if not found:
        return recipe
    merged = {name: options.get(name, {}) | found.get(name, {}) for name in {**options, **found}}
    return replace(recipe, tools=replace(recipe.tools, options=merged))


def _check_tools(recipe: Recipe, recipe_dir: str) -> None:
    from rewards.errors import RewardError
    from rewards.registry import load_reward
    from tools.errors import ToolError
    from tools.formats import open_format
    from tools.remote import all_tools

    key = "tools.use"
    try:
        tools = all_tools(recipe.tools, recipe_dir)
        key = "tools.tags"
        name = recipe.tools.format
        open_format("hermes" if name == "template" else name, tools, recipe.tools.tags)
        key = "scorer.reward"
        load_reward(recipe.scorer.reward, recipe_dir)
    except (ToolError, RewardError) as error:
        raise RecipeError("recipe", key, error.detail) from error


def _check_model(name: str, recipe_dir: str) -> None:
    """A name that may be a hub's is left to the learner, which asks there."""
    if name and (Path(recipe_dir, name).is_dir() or Path(name).is_dir()):
        return
    if ":" in name:
        load_function(name, "policy.model", recipe_dir)
    elif not name or name.startswith((".", "/", "~")):
        raise RecipeError("recipe", "policy.model", f"no folder {name!r}")
