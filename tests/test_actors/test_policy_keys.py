"""Every key of [policy] and [sampling] changes something. A new key without a line here fails."""

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.calling import Calling
from actors.errors import RecipeError
from actors.generator import Generator, Policies
from actors.preflight import check_names
from actors.tasks import Tasks
from engines.chat import Chat
from engines.scripted import ScriptedEngine
from learner.policy import Policy as LearnedPolicy
from schemas.events import Admitted, Result, Turn
from schemas.recipe import Policy, Recipe, Sampling, Tools
from schemas.task import ChatMessage, PublicPart, TaskRow
from schemas.trajectory import fold
from tools.formats import open_format
from tools.registry import load_tools

SAID = {"max_turns": 2, "max_turn_tokens": 4, "max_tokens": 30, "observation_role": "user"}
"""Key → another value than the default."""
OTHERS = {"model", "dtype"}
RECIPE = Recipe(policy=Policy(model="m"), tools=Tools(use=["python"]))
PUBLIC = PublicPart(messages=[ChatMessage(role="user", content="What is 47 * 86?")])


def with_policy(**changes: Any) -> Recipe:
    policy = msgspec.structs.replace(RECIPE.policy, **changes)
    return msgspec.structs.replace(RECIPE, policy=policy)


def test_every_key_is_here() -> None:
    """Of both tables."""
    assert {field.name for field in msgspec.structs.fields(Policy)} == {*SAID, *OTHERS}
    assert [field.name for field in msgspec.structs.fields(Sampling)] == ["temperature"]


async def said(folder: Path, recipe: Recipe) -> list[Turn]:
    """What the generator makes of a policy that calls `python` twice, and then answers."""
    replies = iter(["<python>47*86</python>", "<python>40+2</python>", "4042"])
    engine = ScriptedEngine.open(folder, lambda _text, _seed: next(replies))
    await engine.load(b"", 0)

    async def no_other(*_: int) -> Any:
        raise AssertionError

    calling = Calling(open_format("tagged", load_tools(recipe.tools.use), {}))
    generator = Generator(recipe, Policies(engine, no_other, no_other), Chat(folder), calling, "g")
    seqs = itertools.count(1)
    name = "g0-0-0"
    state = fold(None, Admitted(trajectory=name, task="t", public=PUBLIC, private_key=""), 0)
    while True:
        turn = await generator.handle(state)
        state = fold(state, turn, next(seqs))
        if turn.last:
            return state.turns
        for call, _ in enumerate(turn.calls):
            result = Result(trajectory=name, turn=len(state.turns) - 1, call=call, text="4042")
            state = fold(state, result, next(seqs))


@pytest.mark.parametrize("key", SAID)
async def test_a_key_changes_what_is_said(model_folder: Path, key: str) -> None:
    """Where a turn or a trajectory ends, or the tokens that the policy is given."""
    default = await said(model_folder, RECIPE)
    assert len(default) == 3
    assert await said(model_folder, with_policy(**{key: SAID[key]})) != default


def test_the_dtype_is_that_of_the_weights(model_folder: Path) -> None:
    """Which leave the learner."""
    sizes = [
        len(LearnedPolicy.open(model_folder, with_policy(dtype=dtype)).weights())
        for dtype in ("float32", "bfloat16")
    ]
    assert sizes[0] > 1.8 * sizes[1]


def test_the_model_is_looked_for() -> None:
    with pytest.raises(RecipeError, match=r"policy\.model: no folder './nothing'"):
        check_names(with_policy(model="./nothing"), "")


def test_the_temperature_is_that_of_what_is_admitted() -> None:
    """And the learner's: test_learner/test_keys.py."""
    for temperature in (1.0, 0.5):
        recipe = msgspec.structs.replace(RECIPE, sampling=Sampling(temperature=temperature))
        tasks = Tasks(recipe, iter([TaskRow(id="a", public=PUBLIC)]))
        assert next(tasks.upcoming(0)).template.temperature == temperature
