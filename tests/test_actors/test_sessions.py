"""Tools that keep a state, in a real sandbox: whichever replica takes the next call, the policy sees the same."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from actors.actor import HopFailed
from actors.images import Images
from actors.toolbox import Toolbox
from schemas.events import Admitted, AnyTrajectoryEvent, Call, Result, Turn
from schemas.recipe import Policy, Recipe
from schemas.recipe import Toolbox as ToolboxSection
from schemas.recipe import Tools as ToolsSection
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold
from tools.registry import load_tools
from tools.sandbox.select import open_sandbox

TOOLS = ["bash", "python_session", "python"]
QUESTION = PublicPart(messages=[ChatMessage(role="user", content="?")])


async def nothing(*_: object) -> list[object]:
    return []


async def toolbox(name: str, sessions: int = 8, sessions_mb: int = 4096) -> Toolbox:
    recipe = Recipe(
        policy=Policy(model="m"),
        tools=ToolsSection(use=TOOLS, tier="ns"),
        toolbox=ToolboxSection(sessions=sessions, sessions_mb=sessions_mb),
    )
    images = Images(nothing, nothing)  # type: ignore[arg-type]
    return Toolbox(recipe, load_tools(TOOLS), await open_sandbox("ns"), images, name)


@pytest.fixture
async def boxes() -> AsyncIterator[list[Toolbox]]:
    """Two replicas."""
    made = [await toolbox("toolbox-1"), await toolbox("toolbox-2")]
    yield made
    for box in made:
        await box.close()


class Episode:
    """One trajectory, call by call."""

    def __init__(self, trajectory: str = "g0-0-0") -> None:
        first = Admitted(trajectory=trajectory, task="t", public=QUESTION, private_key="g0")
        self.state: Trajectory = fold(None, first, 1)

    def _fold(self, event: AnyTrajectoryEvent) -> None:
        self.state = fold(self.state, event, self.state.seq + 1)

    async def call(self, box: Toolbox, tool: str, text: str, *, commit: bool = True) -> str:
        """What the policy sees; without `commit` the append was lost to another replica."""
        argument = {"bash": "command"}.get(tool, "code")
        if self.state.next_call is None:
            call = Call(tool=tool, arguments={argument: text})
            self._fold(Turn(trajectory=self.state.id, tokens=Tokens(), text="", calls=[call]))
        result = await box.handle(self.state)
        if commit:
            self._fold(result)
        return result.text.strip()

    def results(self) -> Sequence[Result]:
        return self.state.results


async def test_what_a_call_leaves_is_there_for_the_next(boxes: list[Toolbox]) -> None:
    """Variables of Python, directory and functions of the shell; each tool has its own."""
    episode, box = Episode(), boxes[0]
    await episode.call(box, "python_session", "x = 20")
    await episode.call(box, "bash", "cd /tmp; twice() { echo $(($1 * 2)); }")
    assert await episode.call(box, "python_session", "x + 1") == "21"
    assert await episode.call(box, "bash", "pwd; twice 21") == "/tmp\n42"
    assert "NameError" in await episode.call(box, "python", "x")


async def test_trajectories_share_nothing(boxes: list[Toolbox]) -> None:
    first, second = Episode("g0-0-0"), Episode("g0-1-0")
    await first.call(boxes[0], "python_session", "x = 1")
    assert "NameError" in await second.call(boxes[0], "python_session", "x")


async def test_another_replica_goes_on_where_the_first_was(boxes: list[Toolbox]) -> None:
    """It runs the earlier calls again; and the first one, back again, sees what happened meanwhile."""
    episode = Episode()
    await episode.call(boxes[0], "python_session", "x = [1]")
    await episode.call(boxes[1], "python_session", "x.append(2)")
    assert await episode.call(boxes[0], "python_session", "x") == "[1, 2]"
    assert await episode.call(boxes[0], "python_session", "x") == "[1, 2]"


async def test_a_call_that_was_not_committed_leaves_nothing(boxes: list[Toolbox]) -> None:
    """The replica that lost the race has run it all the same: its session is not what the log says."""
    episode = Episode()
    await episode.call(boxes[0], "python_session", "x = [1]")
    await episode.call(boxes[0], "python_session", "x.append(2); x", commit=False)
    assert await episode.call(boxes[1], "python_session", "x.append(2); x") == "[1, 2]"
    assert await episode.call(boxes[0], "python_session", "x") == "[1, 2]"


async def test_a_replay_that_diverges_is_a_failure(boxes: list[Toolbox]) -> None:
    """Never a wrong observation: what the policy saw cannot be made again."""
    episode = Episode()
    await episode.call(boxes[0], "python_session", "import os; os.urandom(8).hex()")
    with pytest.raises(HopFailed, match=r"tool\.replay_diverged: call 0 of python_session"):
        await episode.call(boxes[1], "python_session", "1")
    assert len(episode.results()) == 1


async def test_an_evicted_session_is_made_anew() -> None:
    """More trajectories than there is room for: none notices."""
    box = await toolbox("toolbox-1", sessions=2)
    episodes = [Episode(f"g0-{member}-0") for member in range(5)]
    for episode in episodes:
        await episode.call(box, "python_session", f"x = {episode.state.id.split('-')[1]}")
    for number, episode in enumerate(episodes):
        assert await episode.call(box, "python_session", "x") == str(number)
    assert len(box.sessions._kept) == 2
    await box.close()


async def test_sessions_share_a_memory_budget() -> None:
    """Those that rest longest go, until the rest fits; one that is in use stays, and none notices."""
    box = await toolbox("toolbox-1", sessions_mb=150)
    episodes = [Episode(f"g0-{member}-0") for member in range(4)]
    for episode in episodes:
        await episode.call(box, "python_session", "x = bytearray(b'1') * (50 << 20)")
    await box.sessions.free_memory()
    assert [key.trajectory for key in box.sessions._kept] == ["g0-2-0", "g0-3-0"]
    using = "import time; x = bytearray(b'2') * (140 << 20); time.sleep(9)"
    use = asyncio.create_task(episodes[2].call(box, "python_session", using))
    await asyncio.sleep(0.5)
    assert await episodes[0].call(box, "python_session", "x[-1]") == "49", "made anew"
    await box.sessions.free_memory()
    assert not use.done()
    await use
    assert "g0-2-0" in [key.trajectory for key in box.sessions._kept]
    assert await episodes[1].call(box, "python_session", "len(x) >> 20") == "50", "made anew"
    assert box.made_anew == 2
    await box.close()


async def test_what_runs_in_the_background_is_measured_too() -> None:
    """A session that grows between two calls is closed by the toolbox's watch."""
    box = await toolbox("toolbox-1", sessions_mb=50)
    episode = Episode()
    async with asyncio.TaskGroup() as group:
        watch = group.create_task(box.sessions.watch_memory())
        grow = "zeros() { head -c $1 /dev/zero; }; zeros 40M > /tmp/f; (sleep 1; zeros 15M > /dev/shm/f) & echo begun"
        assert (await episode.call(box, "bash", grow)).endswith("begun")
        async with asyncio.timeout(20):
            while box.sessions._kept:  # noqa: ASYNC110 - sessions send no events
                await asyncio.sleep(0.01)
        watch.cancel()
    assert await episode.call(box, "bash", "ls /tmp/f") == "/tmp/f", "made anew"
    await box.close()


@pytest.mark.parametrize("meanwhile", ["freed", "closed"])
async def test_trajectories_end_while_sessions_are_closed(meanwhile: str) -> None:
    """Whichever comes first."""
    box = await toolbox("toolbox-1", sessions_mb=1)
    episodes = [Episode(f"g0-{member}-0") for member in range(6)]
    for episode in episodes:
        await episode.call(box, "bash", "x=1")
    async with asyncio.TaskGroup() as group:
        group.create_task(box.sessions.free_memory() if meanwhile == "freed" else box.close())
        while len(box.sessions._kept) == len(episodes):  # noqa: ASYNC110 - it has begun
            await asyncio.sleep(0)
        for episode in episodes[1:5]:
            group.create_task(box.forget(episode.state.id))
    await box.close()
    assert not box.sessions._kept


async def test_an_ended_trajectory_keeps_nothing(boxes: list[Toolbox]) -> None:
    episode = Episode()
    await episode.call(boxes[0], "bash", "x=1")
    await episode.call(boxes[0], "python_session", "x = 1")
    await boxes[0].forget(episode.state.id)
    assert not boxes[0].sessions._kept
    assert await episode.call(boxes[0], "bash", "echo $x") == "1", "late, and made anew"


async def test_a_hundred_turns_of_bash(boxes: list[Toolbox]) -> None:
    """On one replica and then another."""
    episode = Episode()
    for number in range(100):
        text = await episode.call(boxes[number // 50], "bash", "n=$((n + 1)); echo $n")
        assert text == str(number + 1)


async def test_calls_of_many_trajectories_at_once(boxes: list[Toolbox]) -> None:
    episodes = [Episode(f"g{number}-0-0") for number in range(20)]

    async def go(episode: Episode) -> None:
        for number in range(3):
            await episode.call(boxes[0], "python_session", f"x{number} = '{episode.state.id}'")
        assert await episode.call(boxes[0], "python_session", "x0") == f"'{episode.state.id}'"

    await asyncio.gather(*map(go, episodes))
