"""A toolbox that serves good calls and hostile ones at once, and what is left of it all afterwards."""

import asyncio
import gc
from pathlib import Path

import psutil
import pytest

from actors.images import Images
from actors.toolbox import Toolbox
from schemas.events import Admitted, Call, Result, Turn
from schemas.recipe import Policy, Recipe, Tools
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold
from tests.test_tools.attacks import EXHAUSTIONS, INTRUSIONS, intrusion
from tools.registry import load_tools
from tools.sandbox.ns import NamespaceSandbox

pytestmark = pytest.mark.slow

ROUNDS = 2
GOOD = 40
CALLS = 250
"""For 10,000: `python -m bench.sessions --calls 10000`."""


async def nothing(*_: object) -> list[object]:
    return []


def toolbox(**options: dict[str, float]) -> Toolbox:
    recipe = Recipe(policy=Policy(model="m"), tools=Tools(use=["python"]))
    use = ["python", "python_session", "bash"]
    images = Images(nothing, nothing)  # type: ignore[arg-type]
    return Toolbox(recipe, load_tools(use, options=options), NamespaceSandbox(), images, "toolbox")


class Episode:
    """A trajectory of one tool."""

    def __init__(self, name: str, tool: str) -> None:
        self._tool = tool
        public = PublicPart(messages=[])
        first = Admitted(trajectory=name, task="t", public=public, private_key="")
        self._state: Trajectory = fold(None, first, 1)

    async def call(self, box: Toolbox, text: str) -> Result:
        argument = "command" if self._tool == "bash" else "code"
        call = Call(tool=self._tool, arguments={argument: text})
        turn = Turn(trajectory=self._state.id, tokens=Tokens(), text="", calls=[call])
        asked = fold(self._state, turn, self._state.seq + 1)
        result = await box.handle(asked)
        self._state = fold(asked, result, asked.seq + 1)
        return result


class Traces:
    """What calls may leave: files of theirs are in mounts."""

    def __init__(self) -> None:
        gc.collect()
        here = psutil.Process()
        family = [here, *here.children(recursive=True)]
        self.processes = len(family)
        self.servers = {each.pid for each in here.children()}
        self.descriptors = sum(each.num_fds() for each in family)
        self.mounts = sum(
            Path(f"/proc/{each.pid}/mountinfo").read_text().count("\n") for each in family
        )
        self.tasks = len(asyncio.all_tasks())
        self.memory_bytes = sum(each.memory_full_info().uss for each in family)


async def test_the_good_are_served_among_attackers(
    targets: tuple[object, ...],
) -> None:
    """Every good call is answered rightly, in its own session, while all attacks run beside it, again and again."""
    box = toolbox(python={"timeout_s": 1.0}, python_session={"timeout_s": 60.0})
    attacks = {name: intrusion(name, targets) for name in INTRUSIONS}
    attacks |= {name: code for name, (code, _) in EXHAUSTIONS.items()}
    breaches: list[str] = []
    over = asyncio.Event()

    async def attack(name: str, code: str) -> None:
        for number in range(ROUNDS):
            result = await Episode(f"{name}-{number}-0", "python").call(box, code)
            breaches.extend([name] * ("BREACH" in result.text))

    async def good(number: int) -> None:
        """As long as the attacks last, and never less than GOOD calls."""
        episode, expected = Episode(f"good-{number}-0", "python_session"), 0
        await episode.call(box, "n = 0")
        while not over.is_set() or expected < GOOD:
            expected += 1
            assert (await episode.call(box, "n += 1; n")).text == f"{expected}\n"

    served = [asyncio.ensure_future(good(number)) for number in range(2)]
    slots = asyncio.Semaphore(4)

    async def in_turn(name: str, code: str) -> None:
        async with slots:
            await attack(name, code)

    await asyncio.gather(*(in_turn(name, code) for name, code in attacks.items()))
    over.set()
    await asyncio.gather(*served)
    await box.close()
    assert breaches == []


@pytest.mark.parametrize("tool", ["python", "python_session", "bash"])
async def test_many_calls_leave_nothing(tool: str) -> None:
    """No process, mount or descriptor more than after the first few; memory stays as it is."""
    box = toolbox()
    text = "echo 42" if tool == "bash" else "print(6 * 7)"

    async def calls(first: int, count: int) -> None:
        for number in range(first, first + count):
            episode = Episode(f"g{number}-0-0", tool)
            for _ in range(2):
                assert (await episode.call(box, text)).text == "42\n"
            await box.forget(f"g{number}-0-0")

    await calls(0, 40)
    await asyncio.sleep(2.0)  # the next world is made ahead
    before = Traces()
    await calls(40, CALLS)
    after = Traces()
    for _ in range(300):  # the last call's world may still be going
        if (
            after.processes <= before.processes + 1
            and after.mounts <= before.mounts + 40
            and after.descriptors <= before.descriptors + 4
        ):
            break
        await asyncio.sleep(0.1)
        after = Traces()
    await box.close()
    assert after.servers == before.servers, "none has died and was started again"
    assert after.processes <= before.processes + 1, "one world is made ahead"
    assert after.descriptors <= before.descriptors + 4
    assert after.mounts <= before.mounts + 40
    assert after.tasks <= before.tasks
    assert after.memory_bytes < before.memory_bytes + CALLS * 20_000
