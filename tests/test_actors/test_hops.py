"""What each actor makes of a trajectory, with a real chat template, tools and sandbox, and a scripted engine."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from actors.actor import HopFailed
from actors.calling import Calling
from actors.generator import Generator, Policies, turn_seed
from actors.images import Images
from actors.scorer import Scorer
from actors.toolbox import Toolbox
from bus.errors import BusError
from engines.chat import Chat
from engines.engine import Engine
from engines.errors import EngineError
from engines.scripted import ScriptedEngine
from rewards.errors import BadTask
from rewards.registry import load_reward
from rewards.reward import Reward, Run
from schemas.events import (
    Admitted,
    AnyTrajectoryEvent,
    Call,
    Evaluated,
    Result,
    Scored,
    Turn,
)
from schemas.images import StoredImage
from schemas.recipe import Policy, Recipe
from schemas.recipe import Tools as ToolsSection
from schemas.task import ChatMessage, PublicPart, TaskRow
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold
from tools.errors import SandboxError
from tools.formats import open_format
from tools.registry import FunctionTool, load_tools
from tools.sandbox.unsafe import UnsafeSandbox
from tools.tool import Context, Image

RECIPE = Recipe(
    policy=Policy(model="m", max_turns=3, max_turn_tokens=16, max_tokens=100),
    tools=ToolsSection(use=["python"], timeout_s=5, observation_chars=40),
)
QUESTION = ChatMessage(role="user", content="What is 47 * 86?")
ADMITTED = Admitted(
    trajectory="g0-0-0",
    task="47x86",
    public=PublicPart(messages=[QUESTION]),
    private_key="g0",
    seed=7,
)


def says(folder: Path, *replies: str) -> ScriptedEngine:
    """An engine that says the replies given, one a turn."""
    left = list(replies)
    return ScriptedEngine.open(folder, lambda _text, _seed: left.pop(0))


async def weights_of(version: int) -> bytes:
    """Of every version but one."""
    if version == 404:
        raise BusError("version 404 was never published")
    return b""


class Stage:
    """A generator on a scripted engine; `ask` is one hop."""

    def __init__(self, folder: Path, engine: Engine, recipe: Recipe = RECIPE) -> None:
        self.folder = folder
        self.chat = Chat(folder)
        self.opened = 0
        self.policies = Policies(engine, self.open_other, weights_of)
        tools = load_tools(recipe.tools.use)
        self.generator = Generator(
            recipe,
            self.policies,
            self.chat,
            Calling(open_format("tagged", tools, {})),
            "generator-1",
        )

    async def open_other(self) -> Engine:
        self.opened += 1
        return ScriptedEngine.open(
            self.folder, lambda _text, _seed: "4042", seconds_per_token=0.005
        )

    def text(self, ids: object) -> str:
        return str(self.chat._tokenizer.decode(list(ids)))  # type: ignore[call-overload]

    def ids(self, text: str) -> list[int]:
        return list(self.chat._tokenizer.encode(text, add_special_tokens=False))


def state_of(*events: AnyTrajectoryEvent, admitted: Admitted = ADMITTED) -> Trajectory:
    state = fold(None, admitted, 1)
    for seq, event in enumerate(events, 2):
        state = fold(state, event, seq)
    return state


async def scripted(folder: Path, *replies: str, version: int = 0, recipe: Recipe = RECIPE) -> Stage:
    engine = says(folder, *replies)
    await engine.load(b"", version)
    return Stage(folder, engine, recipe)


async def no_image(image: StoredImage) -> Image:
    raise AssertionError(image)


async def no_images(images: Sequence[Image]) -> list[StoredImage]:
    assert not images
    return []


# -- generator -------------------------------------------------------------------------------------


async def test_a_turn_is_what_was_given_and_what_was_sampled(model_folder: Path) -> None:
    """The prompt by the chat template, mask 0; the call with the version that sampled it, mask 1."""
    stage = await scripted(model_folder, "<python>47*86</python>", version=4)
    turn = await stage.generator.handle(state_of())
    given, sampled = turn.tokens.mask.count(0), turn.tokens.mask.count(1)
    assert turn.tokens.mask == bytes(given) + b"\1" * sampled
    assert list(turn.tokens.versions_T) == [-1] * given + [4] * sampled
    assert stage.text(turn.tokens.ids_T) == (
        "<|user|>What is 47 * 86?<|end|><|assistant|><python>47*86</python>"
    )
    assert turn.text == "<python>47*86</python>"
    assert turn.calls == [Call(tool="python", arguments={"code": "47*86"})]
    assert (turn.finish_reason, turn.last, turn.feedback) == ("stop", False, "")
    assert (turn.trajectory, turn.replica) == ("g0-0-0", "generator-1")


async def test_an_observation_is_given_once_and_never_sampled(model_folder: Path) -> None:
    """Between two turns stands the end of the first, which a stop string left out, and the tool's message."""
    stage = await scripted(model_folder, "<python>47*86</python>", "4042")
    first = await stage.generator.handle(state_of())
    result = Result(trajectory="g0-0-0", turn=0, call=0, text="4042")
    second = await stage.generator.handle(state_of(first, result))
    given = second.tokens.mask.count(0)
    assert stage.text(second.tokens.ids_T[:given]) == "<|end|><|tool|>4042<|end|><|assistant|>"
    assert stage.text(second.tokens.ids_T[given:]) == "4042<|end|>"
    assert second.last
    whole = state_of(first, result, second)
    assert stage.text(whole.tokens.ids_T) == (
        "<|user|>What is 47 * 86?<|end|><|assistant|><python>47*86</python>"
        "<|end|><|tool|>4042<|end|><|assistant|>4042<|end|>"
    )
    assert whole.next_hop == ("score", "")


async def test_observations_come_in_the_role_that_the_recipe_says(model_folder: Path) -> None:
    recipe = replace(RECIPE, policy=replace(RECIPE.policy, observation_role="user"))
    stage = await scripted(model_folder, "<python>1</python>", "1", recipe=recipe)
    first = await stage.generator.handle(state_of())
    result = Result(trajectory="g0-0-0", turn=0, call=0, text="1")
    second = await stage.generator.handle(state_of(first, result))
    assert "<|user|>1<|end|>" in stage.text(second.tokens.ids_T)


async def test_a_malformed_call_gets_feedback_and_another_turn(model_folder: Path) -> None:
    """The policy is told what could not be read; nothing runs, and nothing fails."""
    stage = await scripted(model_folder, "47</python>", "4042")
    first = await stage.generator.handle(state_of())
    assert first.calls == []
    assert first.feedback == "</python> without <python> before it."
    assert not first.last
    state = state_of(first)
    assert state.next_hop == ("gen", "")
    second = await stage.generator.handle(state)
    given = second.tokens.mask.count(0)
    assert first.feedback in stage.text(second.tokens.ids_T[:given])


async def test_the_last_of_max_turns_is_the_last(model_folder: Path) -> None:
    """Even if it calls a tool: the call is on record and does not run, and the turn says that a limit ended it."""
    stage = await scripted(model_folder, *["<python>1</python>"] * 3)
    events: list[AnyTrajectoryEvent] = []
    for index in range(3):
        turn = await stage.generator.handle(state_of(*events))
        assert turn.last == (index == 2)
        assert turn.finish_reason == ("length" if turn.last else "stop")
        events += [turn, Result(trajectory="g0-0-0", turn=index, call=0, text="1")]
    assert turn.calls
    assert state_of(*events[:-1]).next_hop == ("score", "")


@pytest.mark.parametrize(("reply", "reason"), [("</python>", "length"), ("4042", "stop")])
async def test_at_the_last_of_max_turns_a_limit_ends_only_what_would_go_on(
    model_folder: Path, reply: str, reason: str
) -> None:
    """A call that could not be read would have been explained; an answer is complete."""
    recipe = replace(RECIPE, policy=replace(RECIPE.policy, max_turns=1))
    stage = await scripted(model_folder, reply, recipe=recipe)
    turn = await stage.generator.handle(state_of())
    assert (turn.finish_reason, turn.last) == (reason, True)


async def test_a_call_that_is_the_answer_ends_the_trajectory_by_itself(model_folder: Path) -> None:
    """It is no limit that ends it, in the last of max_turns neither; the call is on record and does not run."""
    policy = replace(RECIPE.policy, max_turns=1, max_turn_tokens=40)
    recipe = replace(RECIPE, policy=policy, tools=replace(RECIPE.tools, use=["python", "finish"]))
    stage = await scripted(model_folder, "<finish>4042</finish>", recipe=recipe)
    turn = await stage.generator.handle(state_of())
    assert turn.calls == [Call(tool="finish", arguments={"answer": "4042"})]
    assert (turn.finish_reason, turn.last) == ("stop", True)


async def test_a_turn_that_is_too_long_is_the_last(model_folder: Path) -> None:
    """It is cut at max_turn_tokens and says so."""
    stage = await scripted(model_folder, "1 2 3 4 5 6 7 8 9 " * 5)
    turn = await stage.generator.handle(state_of())
    assert turn.tokens.sampled_count == 16
    assert (turn.finish_reason, turn.last) == ("length", True)


async def test_a_trajectory_has_no_more_than_max_tokens(model_folder: Path) -> None:
    """Given and sampled; where an observation leaves no room nothing is sampled any more."""
    stage = await scripted(model_folder, "1 2 3 4 5 6 7 8 9")
    prompt = len(stage.chat.prompt_ids([QUESTION]))
    policy = replace(RECIPE.policy, max_tokens=prompt + 5)
    stage = await scripted(model_folder, "1 2 3 4 5 6 7 8 9", recipe=replace(RECIPE, policy=policy))
    turn = await stage.generator.handle(state_of())
    assert len(turn.tokens) == prompt + 5
    assert (turn.finish_reason, turn.last) == ("length", True)
    full = replace(turn, last=False, finish_reason="stop", feedback="again")
    turn = await stage.generator.handle(state_of(full))
    assert turn.tokens.sampled_count == 0
    assert len(turn.tokens) > 0
    assert (turn.text, turn.finish_reason, turn.last) == ("", "length", True)


async def test_a_drain_ends_a_running_turn(model_folder: Path) -> None:
    """With what it has; that is an event like any other, and another replica goes on from there."""
    begun = asyncio.Event()

    def script(_text: str, _seed: int) -> str:
        begun.set()
        return "4042"

    stage = Stage(model_folder, ScriptedEngine.open(model_folder, script, seconds_per_token=60.0))
    await stage.policies.update(b"", 0)
    running = asyncio.ensure_future(stage.generator.handle(state_of()))
    await begun.wait()
    await stage.generator.drain()
    piece = await running
    assert (piece.finish_reason, piece.last, piece.calls) == ("partial", False, [])
    assert list(piece.tokens.ids_T) == stage.chat.prompt_ids([QUESTION])
    assert state_of(piece).next_hop == ("gen", "")


async def test_a_turn_that_was_cut_short_goes_on(model_folder: Path) -> None:
    """What was sampled is kept, nothing is given again, and the call is read from the whole."""
    stage = await scripted(model_folder, "<python>47*86</python>")
    whole = await stage.generator.handle(state_of())
    given = whole.tokens.mask.count(0)
    ids = list(whole.tokens.ids_T)[: given + 3]
    tokens = Tokens.given(ids[:given]) + Tokens.sampled(ids[given:], [-1.0] * 3, [0] * 3)
    text = stage.chat.decode(ids[given:])
    piece = replace(whole, tokens=tokens, text=text, calls=[], finish_reason="partial")
    other = await scripted(model_folder, whole.text.removeprefix(text), version=1)
    end = await other.generator.handle(state_of(piece))
    assert end.tokens.mask.count(0) == 0
    assert end.calls == [Call(tool="python", arguments={"code": "47*86"})]
    done = state_of(piece, end)
    assert done.turn_text == "<python>47*86</python>"
    assert done.turn_count == 1
    assert list(done.tokens.versions_T)[given:] == [0] * 3 + [1] * end.tokens.sampled_count


@pytest.mark.parametrize("kept", ["", "<", "</pyt", "</python"])
async def test_a_turn_that_was_cut_within_a_closing_tag_ends_with_it(
    model_folder: Path, kept: str
) -> None:
    """The call is whole with the tag's last token: nothing is sampled after it, and it runs."""
    head, tag = "<python>47*86", "</python>"
    stage = await scripted(model_folder, f"{tag.removeprefix(kept)} 4042")
    ids = [id_ for text in (head, *kept) for id_ in stage.ids(text)]
    given = stage.chat.prompt_ids([QUESTION])
    piece = Turn(
        trajectory="g0-0-0",
        tokens=Tokens.given(given) + Tokens.sampled(ids, [0.0] * len(ids), [0] * len(ids)),
        text=head + kept,
        finish_reason="partial",
    )
    end = await stage.generator.handle(state_of(piece))
    assert (end.text, end.finish_reason, end.last) == (tag.removeprefix(kept), "stop", False)
    assert state_of(piece, end).next_call == (0, Call(tool="python", arguments={"code": "47*86"}))


async def test_the_pieces_of_a_turn_share_its_limit(model_folder: Path) -> None:
    """A turn cut into pieces is no longer than one that was not."""
    words = "1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 "
    stage = await scripted(model_folder, words, words)
    whole = await stage.generator.handle(state_of())
    assert whole.tokens.sampled_count == 16
    piece = replace(whole, finish_reason="partial", last=False, calls=[])
    cut = await scripted(model_folder, words)
    end = await cut.generator.handle(state_of(piece))
    assert end.tokens.sampled_count == 0
    assert (end.finish_reason, end.last) == ("length", True)


async def test_a_generator_waits_for_the_version_that_the_work_needs(model_folder: Path) -> None:
    """It samples with nothing older than what was current at admission."""
    stage = await scripted(model_folder, "1", version=2)
    state = state_of(admitted=replace(ADMITTED, min_policy_version=3))
    running = asyncio.ensure_future(stage.generator.handle(state))
    done, _ = await asyncio.wait({running}, timeout=0.05)
    assert not done
    await stage.policies.update(b"", 3)
    turn = await running
    assert turn.tokens.oldest_version == 3


async def test_weights_that_do_not_come_fail_the_hop(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what was wanted and what is held: nothing waits for ever."""
    monkeypatch.setattr("actors.generator._WEIGHTS_WAIT_S", 0.05)
    stage = await scripted(model_folder, "1", version=2)
    state = state_of(admitted=replace(ADMITTED, min_policy_version=3))
    with pytest.raises(HopFailed, match=r"engine\.weights_late: version 3 wanted, 2 held"):
        await stage.generator.handle(state)


def evaluation(version: int) -> Trajectory:
    """One that is pinned to a version."""
    return state_of(admitted=replace(ADMITTED, purpose="eval", pinned_policy_version=version))


async def test_an_evaluation_is_sampled_by_its_own_version(model_folder: Path) -> None:
    """By an engine of its own, which takes each version that is asked for, whatever the live one holds."""
    stage = await scripted(model_folder, version=9)
    for version in (5, 5, 6, 4):
        turn = await stage.generator.handle(evaluation(version))
        assert set(turn.tokens.versions_T) == {-1, version}
    assert stage.opened == 1, "opening one takes vLLM half a minute"
    assert [engine.policy_version for engine in stage.policies.engines()] == [9, 4]
    await stage.generator.close()


async def test_evaluations_of_two_versions_do_not_take_each_other_s_engine(
    model_folder: Path,
) -> None:
    """They overlap where steps are quicker than evaluations: then one waits, and no turn has tokens of two."""
    stage = await scripted(model_folder)
    versions = [5, 6, 5, 6, 7, 5]
    turns = await asyncio.gather(
        *(stage.generator.handle(evaluation(version)) for version in versions)
    )
    assert {turn.finish_reason for turn in turns} == {"stop"}
    assert [set(turn.tokens.versions_T) for turn in turns] == [{-1, each} for each in versions]
    assert stage.opened == 1


async def test_a_version_that_is_not_there_holds_up_nobody(model_folder: Path) -> None:
    """Its turn fails, and the next one finds an engine."""
    stage = await scripted(model_folder, version=9)
    await stage.generator.handle(evaluation(5))
    with pytest.raises(BusError, match="never published"):
        await stage.generator.handle(evaluation(404))
    assert (await stage.generator.handle(evaluation(5))).last


async def test_an_engine_that_breaks_is_replaced(model_folder: Path) -> None:
    """That of evaluations: the turn that finds it broken fails, and one of its next tries has another."""
    stage = await scripted(model_folder, version=9)
    await stage.generator.handle(evaluation(5))
    await stage.policies.engines()[1].close()
    for _ in range(2):
        with pytest.raises(HopFailed, match=r"engine\.closed"):
            await stage.generator.handle(evaluation(5))
    assert (await stage.generator.handle(evaluation(5))).last
    assert stage.opened == 2


async def test_an_engine_s_failure_is_the_engine_s(model_folder: Path) -> None:
    """With its code: never a turn, and never a reward of 0."""
    stage = await scripted(model_folder, "1")
    await stage.policies.live.close()
    with pytest.raises(HopFailed) as caught:
        await stage.generator.handle(state_of())
    assert isinstance(caught.value.__cause__, EngineError)
    assert (caught.value.boundary, caught.value.code) == ("engine", "closed")


def test_each_turn_has_its_own_seed() -> None:
    """Derived from the trajectory's; pieces of a turn too."""
    seeds = {turn_seed(seed, turn) for seed in range(10) for turn in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert turn_seed(7, 0) == turn_seed(7, 0)


# -- toolbox ---------------------------------------------------------------------------------------


@pytest.fixture
async def toolbox() -> AsyncIterator[Toolbox]:
    box = Toolbox(
        RECIPE, load_tools(["python"]), UnsafeSandbox(), Images(no_images, no_image), "toolbox-1"
    )
    yield box
    await box.close()


def calling(*code: str) -> Turn:
    calls = [Call(tool="python", arguments={"code": each}) for each in code]
    return Turn(trajectory="g0-0-0", tokens=Tokens(), text="", calls=calls)


async def test_calls_of_a_turn_run_in_their_order(toolbox: Toolbox) -> None:
    """One a hop; each result names its turn and its call."""
    events: list[AnyTrajectoryEvent] = [calling("1+1", "print(3)")]
    for call, text in enumerate(("2", "3")):
        result = await toolbox.handle(state_of(*events))
        assert (result.turn, result.call, result.text.strip()) == (0, call, text)
        assert result.ok
        assert (result.tier, result.replica, result.trajectory) == (
            "unsafe",
            "toolbox-1",
            "g0-0-0",
        )
        assert result.duration_ms > 0
        events.append(result)
    assert state_of(*events).next_hop == ("gen", "")
    events += [calling("5")]
    assert (await toolbox.handle(state_of(*events))).turn == 1


@pytest.mark.parametrize(
    ("code", "says"), [("1/0", "ZeroDivisionError"), ("def", "SyntaxError"), ("exit(3)", "code 3")]
)
async def test_the_policy_s_own_errors_are_observations(
    toolbox: Toolbox, code: str, says: str
) -> None:
    """It sees them; nothing has failed."""
    result = await toolbox.handle(state_of(calling(code)))
    assert not result.ok
    assert says in result.text or "characters cut" in result.text


async def test_a_long_observation_is_cut(toolbox: Toolbox) -> None:
    """In the middle, and it says so."""
    result = await toolbox.handle(state_of(calling("'x' * 1000")))
    assert "characters cut" in result.text
    assert len(result.text) < 80


async def test_a_tool_that_is_not_there_is_the_recipe_s_fault(toolbox: Toolbox) -> None:
    """A hop that fails with a cause, not an observation."""
    turn = replace(calling(), calls=[Call(tool="search", arguments={})])
    with pytest.raises(HopFailed, match=r"recipe\.unknown_tool: no tool 'search' here"):
        await toolbox.handle(state_of(turn))


async def test_a_broken_sandbox_is_not_the_policy_s_fault() -> None:
    """A typed failure of the boundary that broke."""

    async def python(_context: Context, code: str) -> str:
        raise SandboxError("zygote_died", f"while running {code}")

    box = Toolbox(
        RECIPE,
        {"python": FunctionTool(python)},
        UnsafeSandbox(),
        Images(no_images, no_image),
        "toolbox-1",
    )
    with pytest.raises(HopFailed, match=r"sandbox\.zygote_died: while running 1"):
        await box.handle(state_of(calling("1")))


# -- scorer ----------------------------------------------------------------------------------------


def finished(text: str, admitted: Admitted = ADMITTED) -> Trajectory:
    return state_of(replace(calling(), text=text, last=True), admitted=admitted)


async def private(key: str) -> dict[str, object]:
    assert key == "g0"
    return {"answer": "4042"}


def scorer(reward: object = None) -> Scorer:
    return Scorer(reward or load_reward("exact"), private, UnsafeSandbox(), "scorer-1")  # type: ignore[arg-type]


async def test_a_training_trajectory_is_scored() -> None:
    """By what it said and what only the scorer may read; the numbers and nothing else are told."""
    scored = await scorer().handle(finished("It is 4042."))
    assert scored == Scored(
        trajectory="g0-0-0", replica="scorer-1", reward=1.0, parts={"answered": 1.0}
    )
    assert (await scorer().handle(finished("133"))).reward == 0.0


async def test_an_evaluation_is_evaluated() -> None:
    """Which ends it."""
    admitted = replace(ADMITTED, purpose="eval", pinned_policy_version=0)
    event = await scorer().handle(finished("4042", admitted))
    assert isinstance(event, Evaluated)
    assert event.reward == 1.0


async def test_a_reward_may_be_a_bare_number_and_may_run_code() -> None:
    """The sandbox is handed to it; the task has both parts."""

    async def by_running(task: TaskRow, trajectory: Trajectory, run: Run) -> float:
        outcome = await run(f"print({trajectory.turns[-1].text} == {task.private['answer']})")
        assert task.id == "47x86"
        return float(outcome.output.strip() == b"True")

    scored = await scorer(by_running).handle(finished("47*86"))
    assert (scored.reward, scored.parts) == (1.0, {})


async def test_a_reward_that_cannot_be_given_is_not_0() -> None:
    """The hop fails with the scorer's cause."""

    async def without(task: TaskRow, _trajectory: Trajectory, _run: Run) -> Reward:
        raise BadTask("no_answer", f"{task.id} has none")

    with pytest.raises(HopFailed, match=r"scorer\.no_answer: 47x86 has none"):
        await scorer(without).handle(finished("1"))
