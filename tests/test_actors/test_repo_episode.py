"""A software engineer's trajectory, from a toolbox to a scorer, in real sandboxes: mended, lost on the way, scored."""

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.actor import HopFailed
from actors.images import Images
from actors.scorer import Scorer
from actors.toolbox import Toolbox
from rewards.registry import load_reward
from schemas.events import Admitted, AnyTrajectoryEvent, Call, Result, Scored, Turn
from schemas.recipe import Policy, Recipe
from schemas.recipe import Tools as ToolsSection
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold
from tools.registry import load_tools, open_tools
from tools.repo import repo
from tools.sandbox.ns import NamespaceSandbox
from tools.tool import Place

CODE = "def add(a, b):\n    return a - b\n"
HIDDEN = "from calc import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n"
PRIVATE = {
    "fail_to_pass": ["test_hidden.py::test_add"],
    "files": {"test_hidden.py": HIDDEN},
    "command": "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest -q --junitxml=$REPORT",
}
MINE = """import unittest

from calc import add


class Sums(unittest.TestCase):
    def test_add(self):
        print(object())
        self.assertEqual(add(2, 2), 4)
"""
OPTIONS = {"root": "repositories"}
Action = tuple[str, dict[str, Any]]
MENDING: list[Action] = [
    ("view", {"path": "calc.py"}),
    ("create", {"path": "test_mine.py", "content": MINE}),
    ("run", {"command": "python3 -m unittest"}),
    ("edit", {"path": "calc.py", "old": "a - b", "new": "a + b"}),
    ("run", {"command": "python3 -m unittest"}),
    ("submit", {}),
]


@pytest.fixture
def public(tmp_path: Path) -> PublicPart:
    folder = tmp_path / "repositories" / "calc"
    folder.mkdir(parents=True)
    (folder / "calc.py").write_text(CODE)
    names = {f"GIT_{w}_{n}": "x" for w in ("AUTHOR", "COMMITTER") for n in ("NAME", "EMAIL")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.check_output(command, env=os.environ | names, text=True).strip()

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message=base")
    message = ChatMessage(role="user", content="add() is wrong. Mend it and submit.")
    extra = {"repo": "calc", "commit": git("rev-parse", "HEAD")}
    return PublicPart(messages=[message], extra=extra)


async def nothing(*_: object) -> list[object]:
    return []


@pytest.fixture
async def boxes(tmp_path: Path) -> AsyncIterator[list[Toolbox]]:
    """Two replicas."""
    recipe = Recipe(policy=Policy(model="m"), tools=ToolsSection(use=["repo"]))
    images = Images(nothing, nothing)  # type: ignore[arg-type]
    tools = [load_tools(["repo"], options={"repo": OPTIONS}) for _ in range(2)]
    async with open_tools([each["repo"] for each in tools], Place(recipe_dir=str(tmp_path))):
        made = [
            Toolbox(recipe, each, NamespaceSandbox(), images, f"toolbox-{number}")
            for number, each in enumerate(tools)
        ]
        yield made
        for box in made:
            await box.close()


class Episode:
    """One trajectory, turn by turn."""

    def __init__(self, public: PublicPart) -> None:
        first = Admitted(trajectory="g0-0-0", task="t", public=public, private_key="g0")
        self.state: Trajectory = fold(None, first, 1)

    def fold(self, event: AnyTrajectoryEvent) -> None:
        self.state = fold(self.state, event, self.state.seq + 1)

    async def act(self, box: Toolbox, action: Action) -> Result:
        if self.state.next_call is None:
            function, arguments = action
            call = Call(tool="repo", arguments={"function": function, "arguments": arguments})
            self.fold(Turn(trajectory="g0-0-0", tokens=Tokens(), text="", calls=[call]))
        result = await box.handle(self.state)
        self.fold(result)
        return result

    async def play(self, box_of: Callable[[int], Toolbox], actions: Sequence[Action]) -> None:
        for number, action in enumerate(actions):
            await self.act(box_of(number), action)


async def score(state: Trajectory, tmp_path: Path) -> Scored:
    async def load_private(_: str) -> dict[str, Any]:
        return PRIVATE

    with repo.configured(OPTIONS).repositories(str(tmp_path)) as repositories:
        sandbox = NamespaceSandbox()
        scorer = Scorer(load_reward("repo_tests"), load_private, sandbox, "scorer", repositories)
        scored = await scorer.handle(state)
        await scorer.close()
    assert isinstance(scored, Scored)
    return scored


async def test_what_is_mended_and_submitted_scores(
    boxes: list[Toolbox], public: PublicPart, tmp_path: Path
) -> None:
    """`submit` is the last hop of the toolbox; a trajectory that ends without it is worth nothing."""
    episode = Episode(public)
    await episode.play(lambda _: boxes[0], MENDING)
    assert "FAILED" in episode.state.results[2].text
    assert "\nOK\n" in episode.state.results[4].text
    hop = episode.state.next_hop
    assert hop is not None
    assert hop.stage == "score"
    assert (await score(episode.state, tmp_path)).reward == 1.0

    without = Episode(public)
    await without.play(lambda _: boxes[0], MENDING[:-1])
    without.fold(Turn(trajectory="g0-0-0", tokens=Tokens(), text="Done.", last=True))
    scored = await score(without.state, tmp_path)
    assert (scored.reward, scored.parts["submitted"]) == (0.0, 0.0)


async def test_a_session_may_be_anywhere_at_every_turn(
    boxes: list[Toolbox], public: PublicPart
) -> None:
    """Each turn on the other replica: the work tree is made anew, and the patch is the same.

    Durations and addresses that the tests of the policy print are others, which is no divergence.
    """
    here, everywhere = Episode(public), Episode(public)
    await here.play(lambda _: boxes[0], MENDING)
    await boxes[0].forget("g0-0-0")
    await everywhere.play(lambda number: boxes[number % 2], MENDING)
    assert boxes[0].made_anew + boxes[1].made_anew == len(MENDING) - 1
    patches = [each.state.results[-1].handed_in for each in (here, everywhere)]
    assert patches[0] == patches[1] != b""


async def test_a_sandbox_killed_in_the_middle_is_rebuilt(
    boxes: list[Toolbox], public: PublicPart, tmp_path: Path
) -> None:
    """The next call fails as infrastructure and is handed out again; then all goes on as if nothing had been."""
    episode = Episode(public)
    await episode.play(lambda _: boxes[0], MENDING[:4])
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "tools.sandbox.zygote" in child.cmdline():
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
    with pytest.raises(HopFailed, match=r"sandbox\.zygote_died"):
        await episode.act(boxes[0], MENDING[4])
    await episode.play(lambda _: boxes[0], MENDING[4:])
    assert boxes[0].made_anew == 1
    assert (await score(episode.state, tmp_path)).reward == 1.0
