"""Rewards: what is right, what is wrong, and what is nobody's answer."""

from collections.abc import AsyncIterator, Awaitable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from rewards.answer import boxed_answer, tagged_answer
from rewards.errors import BadReward, BadTask, RewardError, UnknownReward
from rewards.exact import as_number, final_answer
from rewards.registry import CheckedReward, load_reward
from rewards.reward import Ran, Reward, Run
from schemas.events import Admitted, Turn
from schemas.task import PublicPart, TaskRow
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory
from tools.errors import SandboxError
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits

EXAMPLES = str(Path(__file__).parents[2] / "examples")


def task(**private: Any) -> TaskRow:
    return TaskRow(id="t", public=PublicPart(messages=[]), private=private)


def trajectory(*texts: str) -> Trajectory:
    admitted = Admitted(
        trajectory="g-0-0", task="t", public=PublicPart(messages=[]), private_key="k"
    )
    turns = [Turn(trajectory="g-0-0", tokens=Tokens(), text=text) for text in texts]
    return Trajectory(admitted=admitted, turns=turns)


async def no_run(code: str, *, stdin: bytes = b"") -> Ran:
    raise AssertionError("this reward runs nothing")


# -- exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "value", "answered"),
    [
        ("<answer>42</answer>", 42, 1, 1),
        ("<answer>41</answer> no: <answer> 42.0 </answer>", "42", 1, 1),
        ("41 <answer>42</answer> 43", 42, 1, 1),
        ("so \\boxed{1,234} of 5", "1234", 1, 1),
        ("\\boxed{\\frac{1}{2}} and more", "\\frac{1}{2}", 1, 1),
        ("It is 12 - 5 = 7.", 7, 1, 1),
        ("It costs $1,234.50.", 1234.5, 1, 1),
        ("\N{MINUS SIGN}3", -3, 1, 1),
        ("10-5", 5, 1, 1),
        ("nothing at all", 7, 0, 0),
        ("<answer>forty-two</answer>", 42, 0, 1),
        ("Paris", "Paris", 1, 1),
        ("  New \n York ", "New York", 1, 1),
        ("It is Paris", "Paris", 0, 1),
        ("", "Paris", 0, 0),
        ("<answer></answer>", "Paris", 0, 1),
        ("42<|im_end|>", 42, 1, 1),
        ("x42", 42, 0, 0),
        ("v1.2.3", 3, 0, 0),
    ],
)
async def test_exact_compares_the_final_answer(
    text: str, answer: Any, value: float, answered: float
) -> None:
    """The last tag, else the last box, else the last number or the whole text; numbers by value."""
    reward = await load_reward("exact")(task(answer=answer), trajectory("7", text), no_run)
    assert reward == Reward(value=value, parts={"answered": answered})


async def test_exact_without_what_it_needs() -> None:
    """A trajectory without turns is a wrong answer; a task without an answer is not."""
    exact = load_reward("exact")
    assert (await exact(task(answer=1), trajectory(), no_run)).value == 0
    with pytest.raises(BadTask, match="no_answer"):
        await exact(task(), trajectory("1"), no_run)


decimals = st.decimals(
    allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4
)


@given(decimals, st.integers(0, 5), st.sampled_from(["", "$"]))
@example(Decimal("-0"), 0, "")
def test_ways_to_write_a_number_are_equal(number: Decimal, zeros: int, sign: str) -> None:
    """Thousands separators, trailing zeros, a currency sign and spaces do not change it."""
    written = f" {sign}{number:,.4f}" + "0" * zeros + " "
    assert as_number(written) == number
    assert as_number(f"{number:f}") == number


@given(st.integers(-(10**9), 10**9), st.text(alphabet=st.characters(categories=["L", "Z"])))
def test_the_last_number_in_a_sentence_is_found(number: int, words: str) -> None:
    """Whatever words are around it."""
    found = final_answer(f"1 {words} {number:,}. {words}", "5")
    assert found is not None
    assert as_number(found) == number


@given(st.text())
def test_answers_are_looked_for_in_any_text(text: str) -> None:
    """No text raises, and an answer put around it is found."""
    for expected in ("5", "word"):
        final_answer(text, expected)
    assert tagged_answer(f"{text}<answer>found</answer>") is not None
    assert boxed_answer(text + "\\boxed{a{b}c}") == "a{b}c"


BOXED_PARTS = st.lists(st.sampled_from(["\\boxed{", "{", "}", " ", "x", "\\boxed"]), max_size=20)


def by_depth(text: str) -> str | None:
    """What is inside the last complete box: from each of its beginnings, from behind."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for position in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + 7 : position].strip()
        start = text.rfind("\\boxed{", 0, start)
    return None


@given(BOXED_PARTS)
def test_boxes_are_read_whole(parts: list[str]) -> None:
    """The last one whose braces are closed, with those inside it."""
    text = "".join(parts)
    assert boxed_answer(text) == by_depth(text)


@pytest.mark.timeout(60)  # each took hours
@pytest.mark.parametrize("opening", ["\\boxed{", "<answer>"])
def test_what_is_never_closed_costs_no_more_than_its_length(opening: str) -> None:
    """A scorer has other trajectories, too."""
    text = opening * 300_000
    assert boxed_answer(text) is None
    assert tagged_answer(text) is None
    assert boxed_answer("\\boxed{1}" + text) in ("1", None)


@pytest.mark.parametrize("cut", range(len("<answer>4042</answer>") + 1))
async def test_an_answer_cut_into_pieces_is_one(cut: int) -> None:
    """By a drain, or for new weights."""
    text = "<answer>4042</answer>"
    whole = trajectory("4041", text)
    first = replace(whole.turns[-1], text=text[:cut], finish_reason="partial")
    pieces = [whole.turns[0], first, replace(whole.turns[-1], text=text[cut:])]
    reward = await load_reward("exact")(task(answer="4042"), replace(whole, turns=pieces), no_run)
    assert reward == Reward(value=1.0, parts={"answered": 1.0})


# -- math --------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[NamespaceSandbox]:
    opened = NamespaceSandbox(load_reward("math").imports)
    yield opened
    await opened.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("answer", "text", "value", "answered"),
    [
        ("1/2", "so \\boxed{0.5}", 1, 1),
        ("\\frac{1}{2}", "so $\\frac{2}{4}$", 1, 1),
        ("2\\sqrt{2}", "<answer>\\sqrt{8}</answer>", 1, 1),
        ("x^2-1", "\\boxed{(x-1)(x+1)}", 1, 1),
        (5, "\\boxed{6}", 0, 1),
        (5, "I do not know", 0, 0),
        (5, "\\boxed{" + "(" * 3000 + "5", 0, 0),
        (5, "</answer>\0\ud800", 0, 0),
    ],
)
async def test_math_compares_values(
    sandbox: NamespaceSandbox, answer: Any, text: str, value: float, answered: float
) -> None:
    """Equal mathematics is equal, however it is written."""
    reward = await load_reward("math")(task(answer=answer), trajectory(text), sandbox.run)
    assert (reward.value, reward.parts["answered"]) == (value, answered)


@pytest.mark.asyncio(loop_scope="module")
async def test_an_answer_that_never_ends_is_wrong(sandbox: NamespaceSandbox) -> None:
    """The sandbox's limit ends it; that is the policy's fault, and a reward of 0."""
    run = partial(sandbox.run, limits=Limits(wall_s=10.0))
    reward = await load_reward("math")(task(answer=5), trajectory("\\boxed{9^{9^{9}}}"), run)
    assert reward == Reward(value=0.0, parts={"answered": 0.0, "unreadable": 1.0})


@pytest.mark.asyncio(loop_scope="module")
async def test_an_expected_answer_that_cannot_be_read_is_no_reward(
    sandbox: NamespaceSandbox,
) -> None:
    """The task is broken; nobody is scored by it."""
    with pytest.raises(BadTask, match="cannot read the expected answer"):
        await load_reward("math")(task(answer="}{"), trajectory("\\boxed{5}"), sandbox.run)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_missing_library_is_no_reward(sandbox: NamespaceSandbox) -> None:
    """Not a wrong answer; the message says what to install."""

    def run(code: str, *, stdin: bytes = b"") -> Awaitable[Ran]:
        return sandbox.run(f"import sys\nsys.modules['math_verify'] = None\n{code}", stdin=stdin)

    with pytest.raises(RewardError, match="not_installed"):
        await load_reward("math")(task(answer=5), trajectory("5"), run)


async def test_a_failing_sandbox_is_no_reward() -> None:
    """Infrastructure raises; it never scores."""
    sandbox = NamespaceSandbox()
    await sandbox.close()
    with pytest.raises(SandboxError):
        await load_reward("math")(task(answer=5), trajectory("5"), sandbox.run)


# -- names and numbers -------------------------------------------------------------------------------


async def test_a_reward_beside_the_recipe() -> None:
    """`module:function` is looked up in the recipe's directory; the example works."""
    length = load_reward("length_reward:length", EXAMPLES)
    reward = await length(task(max_chars=5), trajectory("1234567890"), no_run)
    assert reward == Reward(value=0.5, parts={"chars": 10.0})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exakt", "did you mean exact"),
        ("zzz", "there are exact, math"),
        ("no_such_module:f", "no_such_module"),
        ("json:no_such_function", "no_such_function"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, says: str) -> None:
    """With the closest there is."""
    with pytest.raises(UnknownReward, match=says):
        load_reward(name)


@pytest.mark.parametrize(
    "given",
    ["float('nan')", "float('inf')", "None", "'1'", "Reward(value=1, parts={'x': float('nan')})"],
)
async def test_what_is_not_a_finite_number_is_refused(given: str) -> None:
    """One of these would poison a whole step; the message names the reward and the trajectory."""

    async def reward(_task: TaskRow, _trajectory: Trajectory, _run: Run) -> Any:
        return eval(given)

    with pytest.raises(BadReward, match=r"mine gave .* for g-0-0"):
        await CheckedReward("mine", reward)(task(), trajectory("x"), no_run)
