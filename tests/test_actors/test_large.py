"""What does not fit a message: images of 20 MB, trajectories of 100 000 tokens; against a real server."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.heartbeat import Vitals
from actors.images import image_size
from actors.learner import Planner
from actors.process import Hops, Process
from actors.roles import serve_toolbox
from actors.views import trajectory_text
from bus import blobs, subjects
from bus.connection import Bus
from bus.log import Log
from bus.provision import provision
from bus.work import STATE_LIMIT_BYTES, publish_work, work_message
from schemas.events import Admitted, Call, Event, Result, Scored, Turn
from schemas.messages import RoleName
from schemas.recipe import Policy, Recipe, Tools
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory

IMAGE_BYTES = 20 << 20
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (640).to_bytes(4, "big") + (480).to_bytes(4, "big")
CAMERA = f"""
from tools.tool import Image, Observation

async def camera(context, place: str) -> Observation:
    \"\"\"Take a picture of a place.\"\"\"
    large = Image(data={PNG!r} + bytes({IMAGE_BYTES}), media_type="image/png")
    small = Image(data=b"gif", media_type="image/gif")
    return Observation(text="<image> and <image>", images=[large, small])
"""
ADMITTED = Admitted(trajectory="g0-0-0", task="t", public=PublicPart(messages=[]), private_key="g0")


def process_of(bus: Bus, log: Log, role: RoleName, recipe: Recipe, folder: str = "") -> Process:
    vitals = Vitals(run=log.run, role=role, replica=f"{role}-test-1")
    return Process(bus, log, recipe, folder, vitals, asyncio.Event())


@asynccontextmanager
async def serving(process: Process, role: "asyncio.Future[None]") -> AsyncIterator[None]:
    try:
        yield
    finally:
        process.stopping.set()
        await asyncio.wait_for(role, 30.0)


async def the_first(log: Log, subject: str) -> Event:
    async with asyncio.timeout(60.0):
        async for found in log.follow(subject=subject):
            if found:
                return found[0].event
    raise AssertionError("a follower never ends")


async def test_an_image_of_20_mb_passes(bus: Bus, log: Log, tmp_path: Path) -> None:
    """From the tool to the store, and its hash to the log; `actors show` names it, anyone can get it."""
    (tmp_path / "camera.py").write_text(CAMERA)
    recipe = Recipe(policy=Policy(model="m"), tools=Tools(use=["camera:camera"], tier="unsafe"))
    await provision(bus, log.run, ["camera"])
    seq = await log.append(ADMITTED, 0)
    call = Call(tool="camera", arguments={"place": "here"})
    turn = Turn(trajectory="g0-0-0", tokens=Tokens.sampled([1], [-0.5], [0]), text="", calls=[call])
    seq = await log.append(turn, seq)
    await publish_work(bus, log.run, Trajectory(admitted=ADMITTED, turns=[turn], seq=seq))
    process = process_of(bus, log, "toolbox", recipe, str(tmp_path))
    async with serving(process, asyncio.ensure_future(serve_toolbox(process))):
        result = await the_first(log, subjects.trajectory(log.run, "g0-0-0", "result"))
    assert isinstance(result, Result)
    assert result.text == "<image> and <image>"
    data = PNG + bytes(IMAGE_BYTES)
    image, other = result.images
    assert image.sha256 == hashlib.sha256(data).hexdigest()
    assert (image.media_type, image.size_bytes) == ("image/png", len(data))
    assert (image.width, image.height) == (640, 480)
    assert (other.media_type, other.size_bytes, other.width) == ("image/gif", 3, 0)
    assert await blobs.get_blob(bus, log.run, image.sha256) == data
    state = await log.trajectory("g0-0-0")
    assert state is not None
    shown = trajectory_text(state)
    assert f"image {image.sha256}   image/png   640 x 480   {len(data)} bytes" in shown


class Rambler:
    """An actor of the generator's stage that says 50 000 tokens a turn, three times."""

    stage = "gen"
    produces = (Turn,)

    def __init__(self) -> None:
        self.seen: list[Trajectory] = []

    async def handle(self, state: Trajectory) -> Turn:
        self.seen.append(state)
        number = len(state.turns)
        ids = range(number * 50_000, (number + 1) * 50_000)
        tokens = Tokens.sampled(ids, [-id_ / 1e6 for id_ in ids], [number] * len(ids))
        last = number == 2
        return Turn(trajectory=state.id, tokens=tokens, text="…", feedback="go on", last=last)

    async def drain(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def test_a_trajectory_of_150_000_tokens_passes(bus: Bus, log: Log) -> None:
    """Its wake-ups carry the sequence only, each hop folds it from the log, and so does the learner: all the same."""
    rambler = Rambler()
    process = process_of(bus, log, "generator", Recipe(policy=Policy(model="m")))
    seq = await log.append(ADMITTED, 0)
    await publish_work(bus, log.run, Trajectory(admitted=ADMITTED, seq=seq))
    async with serving(process, asyncio.ensure_future(Hops(process, rambler).serve([""], 1))):
        async with asyncio.timeout(60.0):
            async for found in log.follow(subject=subjects.trajectory(log.run, "g0-0-0", "turn")):
                if any(isinstance(each.event, Turn) and each.event.last for each in found):
                    break
    state = await log.trajectory("g0-0-0")
    assert state is not None
    assert len(work_message(state)) < 1000 < STATE_LIMIT_BYTES
    assert [len(seen.tokens) for seen in rambler.seen] == [0, 50_000, 100_000]
    assert list(state.tokens.ids_T) == list(range(150_000))
    assert state.next_hop == ("score", "")
    await log.append(Scored(trajectory="g0-0-0", reward=1.0), state.seq)
    planner = Planner(process.recipe, 0)
    async for stored in log.read():
        planner.observe(stored.event, stored.seq, stored.time_s)
    assert planner.trajectories["g0-0-0"] == await log.trajectory("g0-0-0")
    waiting = json.loads((await bus.request("$JS.API.STREAM.INFO.SCORE", b"")).data)
    assert waiting["state"]["bytes"] < 2000


# -- images' headers -------------------------------------------------------------------------------


def jpeg(width: int, height: int, before: bytes = b"") -> bytes:
    frame = b"\xff\xc2\x00\x11\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return b"\xff\xd8" + before + frame + bytes(20)


@given(st.integers(1, 65535), st.integers(1, 65535), st.binary(max_size=300))
def test_a_jpeg_says_its_size_behind_whatever_segments(
    width: int, height: int, extra: bytes
) -> None:
    segment = b"\xff\xe1" + (len(extra) + 2).to_bytes(2, "big") + extra
    assert image_size(jpeg(width, height, segment)) == (width, height)


@given(st.binary(max_size=400), st.sampled_from([b"", PNG[:16], b"\xff\xd8", b"\xff\xd8\xff\xe0"]))
def test_no_bytes_are_too_odd_for_a_size(data: bytes, start: bytes) -> None:
    """Cut short, mangled, or no image: two numbers that are not negative."""
    width, height = image_size(start + data)
    assert width >= 0
    assert height >= 0


@pytest.mark.parametrize("cut", range(24))
def test_a_header_cut_short_has_no_size(cut: int) -> None:
    assert image_size(PNG[:cut]) == (0, 0)
