"""examples/tool-worker-node: what docs/wire.md asks of a worker, of one in JavaScript against a real server."""

import asyncio
import json
import os
import signal
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors import run_folder
from actors.run_folder import RunFolder
from bus import subjects
from bus.codec import decode
from bus.connection import Bus, Message
from bus.dead import follow_dead
from bus.embedded import EmbeddedServer
from bus.log import Log
from bus.provision import provision
from bus.work import Delivery, open_queue, publish_work
from schemas.events import Admitted, Call, Failed, Opened, Result, Turn
from schemas.messages import DeadLetter, Heartbeat
from schemas.recipe import Deadlines, Policy, Recipe, RemoteTool, Tools
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold
from tools.remote import read_shown, remote_tools

EXAMPLE = Path(__file__).parents[1] / "examples" / "tool-worker-node"
RUN = "test"
PATIENCE_S = 60.0
RECIPE = Recipe(
    policy=Policy(model="m"),
    tools=Tools(
        remote={
            "word_count": RemoteTool(description="Count words.", parameters='{"type": "object"}')
        },
        timeout_s=0.3,
        observation_chars=80,
    ),
    deadlines=Deadlines(handler_failures=2),
)


class Served:
    """A run with one worker, and what the worker is asked."""

    def __init__(self, bus: Bus, log: Log, worker: asyncio.subprocess.Process) -> None:
        self.bus = bus
        self.log = log
        self.worker = worker
        self.replica = ""

    async def begin(self, name: str, *calls: Call) -> Trajectory:
        """A trajectory that waits for its first call."""
        message = ChatMessage(role="user", content="?")
        public = PublicPart(messages=[message], extra={"unit": "apples"})
        admitted = Admitted(trajectory=name, task="t", public=public, private_key="k", seed=2**62)
        turn = Turn(
            trajectory=name, tokens=Tokens.sampled([1], [-0.5], [3]), text="", calls=list(calls)
        )
        seq = await self.log.append(admitted, 0)
        state = fold(None, admitted, seq)
        return fold(state, turn, await self.log.append(turn, seq))

    async def ask(self, name: str, text: Any, *more: Call) -> Result:
        """The result of a call with this text."""
        state = await self.begin(name, Call(tool="word_count", arguments={"text": text}), *more)
        await publish_work(self.bus, RUN, state)
        return await self.result(name)

    async def result(self, name: str) -> Result:
        subject = subjects.trajectory(RUN, name, "result")
        async with asyncio.timeout(PATIENCE_S):
            async for found in self.log.follow(subject=subject, poll_s=0.02):
                for stored in found:
                    assert isinstance(stored.event, Result)
                    return stored.event
        raise AssertionError

    async def following(self, stage: subjects.Stage, tool: str = "") -> Delivery:
        """The work message that wakes the next stage."""
        async with (
            asyncio.timeout(PATIENCE_S),
            open_queue(self.bus, stage, RUN, tool, slots=1) as queue,
        ):
            delivery = await queue.take()
            await delivery.done()
            return delivery

    async def letters(self) -> list[DeadLetter]:
        """What was put aside, once there is something."""
        async with asyncio.timeout(PATIENCE_S):
            async for letters in follow_dead(self.bus, RUN):
                if letters:
                    return letters
        raise AssertionError

    async def acknowledged(self) -> None:
        """Until nothing lies in the tool's queue, held or waiting."""
        query = json.dumps({"subjects_filter": subjects.work("tool", RUN, "word_count")}).encode()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                answer = await self.bus.request("$JS.API.STREAM.INFO.TOOL", query)
                if not json.loads(answer.data)["state"]["messages"]:
                    return
                await asyncio.sleep(0.05)


@asynccontextmanager
async def working(
    folder: Path, run: Path, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker process; killed in the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        "node",
        "worker.mjs",
        str(run),
        "./odd_word_count.mjs",
        cwd=folder,
        env=os.environ | {"NATS_URL": ""} | environment,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert b" serves word_count of run " in await process.stdout.readline()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def served(
    bus: Bus,
    log: Log,
    server: EmbeddedServer,
    worker_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Served]:
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    folder = RunFolder(RUN)
    folder.path.mkdir()
    folder.write_endpoint(server.logins)
    await provision(bus, RUN, RECIPE.tools.names)
    await log.append_run(Opened(recipe=RECIPE))
    async with working(worker_folder, folder.path) as worker:
        yield Served(bus, log, worker)


async def test_a_call_is_served(served: Served) -> None:
    """By the commit rule, in the replica's own name; the next stage is woken, and the message is acknowledged."""
    result = await served.ask("g0-0-0", "a rose is a rose")
    assert (result.text, result.ok, result.turn, result.call) == ("5", True, 0, 0)
    assert result.replica.startswith("toolbox-")
    assert result.replica.endswith(f"-{served.worker.pid}")
    state = await served.log.trajectory("g0-0-0")
    assert state is not None
    work = (await served.following("gen")).work()
    assert (work.trajectory, work.seq, work.failures) == ("g0-0-0", state.seq, 0)
    await served.acknowledged()


async def test_a_login_file_is_enough(
    served: Served, server: EmbeddedServer, worker_folder: Path, tmp_path: Path
) -> None:
    """At a server of one's own there is no folder of the run."""
    logins = tmp_path / "logins"
    server.logins.write(logins)
    for path in logins.iterdir():
        if path.name != "toolbox.json":
            path.unlink()
    served.worker.terminate()
    await served.worker.wait()
    async with working(worker_folder, Path(RUN), NATS_URL=str(logins / "toolbox.json")):
        assert (await served.ask("g0-0-0", "a rose is a rose")).text == "5"


async def test_calls_of_a_turn_go_from_queue_to_queue(served: Served) -> None:
    """The next call may be of another tool, in a version of its own."""
    await provision(served.bus, RUN, ["sql@0a1b2c3d"])
    await served.ask("g0-0-0", "one", Call(tool="sql", arguments={}, version="0a1b2c3d"))
    assert (await served.following("tool", "sql@0a1b2c3d")).work().trajectory == "g0-0-0"


@pytest.mark.parametrize(
    ("text", "ok", "says"),
    [
        (7, False, "Wrong arguments for word_count: `text` must be a string"),
        ("hang", False, "Timed out after 0.3 s."),
        ("long", True, "é" * 80 + "\n(cut)"),
        ("task", True, "apples"),
    ],
)
async def test_what_a_policy_gets_wrong_is_an_observation(
    served: Served, text: Any, ok: bool, says: str
) -> None:
    """Wrong arguments and time-outs are results; texts are cut at the recipe's limit; the task's own part is there."""
    result = await served.ask("g0-0-0", text)
    assert (result.text, result.ok) == (says, ok)


async def test_the_state_is_folded_from_the_log(served: Served) -> None:
    """A message that has only the sequence, and junk in the log, which moves the sequence and changes nothing else."""
    state = await served.begin("g0-0-0", Call(tool="word_count", arguments={"text": "one two"}))
    for kind, junk in (("turn", b"\xc1"), ("scored", b"\x81\xa4kind\xa6scored")):
        await served.bus.store(subjects.trajectory(RUN, "g0-0-0", kind), junk)
    folded = await served.log.trajectory("g0-0-0")
    assert folded is not None
    assert folded.seq > state.seq
    await publish_work(served.bus, RUN, folded, again=True)
    assert (await served.result("g0-0-0")).text == "2"


async def test_a_race_that_was_lost_changes_nothing(served: Served) -> None:
    """An old message: the winner's next stage is woken, and there is one result."""
    state = await served.begin("g0-0-0", Call(tool="word_count", arguments={"text": "one"}))
    winner = Result(trajectory="g0-0-0", turn=0, call=0, text="another's")
    await served.log.append(winner, state.seq)
    await publish_work(served.bus, RUN, state)  # with a state that was true
    assert (await served.following("gen")).work().seq > state.seq
    folded = await served.log.trajectory("g0-0-0")
    assert folded is not None
    assert folded.results == [winner]
    await served.acknowledged()


async def test_a_trajectory_that_has_ended_wakes_nobody(served: Served) -> None:
    state = await served.begin("g0-0-0", Call(tool="word_count", arguments={"text": "one"}))
    cause = {"boundary": "deadline", "code": "tool"}
    failed = Failed(trajectory="g0-0-0", cause=cause)  # type: ignore[arg-type]
    await served.log.append(failed, state.seq)
    await publish_work(served.bus, RUN, state)
    await served.acknowledged()
    folded = await served.log.trajectory("g0-0-0")
    assert folded is not None
    assert not folded.results


async def test_a_poison_message_is_put_aside(served: Served) -> None:
    """With its bytes and its error; the queue goes on."""
    await served.bus.store(subjects.work("tool", RUN, "word_count"), b"\xc1")
    (letter,) = await served.letters()
    assert (letter.boundary, letter.code, letter.payload) == ("bus", "bad_message", b"\xc1")
    assert (await served.ask("g0-0-0", "one")).text == "1"


async def test_a_tool_that_fails_is_tried_again_and_then_put_aside(served: Served) -> None:
    """With what it threw: the dispatcher ends the trajectory with this cause."""
    state = await served.begin("g0-0-0", Call(tool="word_count", arguments={"text": "crash"}))
    await publish_work(served.bus, RUN, state)
    (letter,) = await served.letters()
    assert (letter.trajectory, letter.seq) == ("g0-0-0", state.seq)
    assert (letter.boundary, letter.code) == ("tool", "crashed")
    assert "the dictionary is away" in letter.error
    await served.acknowledged()


async def test_it_gives_signs_of_life_and_drains(served: Served) -> None:
    """As a toolbox; on SIGTERM it ends well, within the time to drain."""
    beats: asyncio.Queue[Message] = asyncio.Queue()
    await served.bus.subscribe(subjects.heartbeat("toolbox"), beats.put)
    async with asyncio.timeout(PATIENCE_S):
        beat = decode((await beats.get()).data, Heartbeat)
    assert (beat.role, beat.pid, beat.run) == ("toolbox", served.worker.pid, RUN)
    assert beat.rss_bytes > 1 << 20
    os.kill(served.worker.pid, signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        assert await served.worker.wait() == 0


async def test_a_server_that_is_killed_is_waited_for(
    served: Served, server: EmbeddedServer
) -> None:
    """It comes again with its store, and the worker goes on."""
    assert (await served.ask("g0-0-0", "one")).text == "1"
    server.kill()
    server.start()
    assert (await served.ask("g1-0-0", "one two")).text == "2"
    assert served.worker.returncode is None


def test_the_readme_shows_the_tool_as_it_is() -> None:
    """Its recipe and word_count.json say the same arguments, and the packages are those of the other example."""
    packages = [
        json.loads((folder / "package.json").read_text())["dependencies"]
        for folder in (EXAMPLE, EXAMPLE.parent)
    ]
    assert packages[0] == packages[1]
    text = (EXAMPLE / "README.md").read_text().split("```toml\n")[1].partition("```")[0]
    remote = {
        name: RemoteTool(**table) for name, table in tomllib.loads(text)["tools"]["remote"].items()
    }
    (function,) = remote_tools(remote)["word_count"].functions
    shown = read_shown((EXAMPLE / "word_count.json").read_bytes())
    assert function.name == shown.name
    assert function.description == shown.description
    assert function.parameters["required"] == shown.parameters["required"]
    assert function.parameters["properties"].keys() == shown.parameters["properties"].keys()
