"""`actors archive`: nothing is deleted before a whole copy of it is on the disk."""

import asyncio
import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import run_folder
from actors.archive import (
    BadArchive,
    Head,
    Kept,
    Tail,
    Writer,
    archive,
    check_archive,
    read_archive,
)
from actors.errors import UserError
from actors.train import _open
from bus import blobs, policy, private, store
from bus.codec import decode
from bus.connection import Bus
from bus.dead import dead_letters, publish_dead
from bus.log import Log
from bus.work import publish_work
from schemas.events import Admitted, AnyEvent, Archived, Ended, Expired
from schemas.messages import DeadLetter, WeightsPointer
from schemas.recipe import Policy, Recipe
from schemas.task import PublicPart
from schemas.trajectory import Trajectory

AtHome = Callable[[], AbstractAsyncContextManager[tuple[Bus, Log]]]
TRAJECTORIES = 50


async def fill(bus: Bus, log: Log, run: str = "test") -> None:
    """Something of everything that a run leaves."""
    for member in range(TRAJECTORIES):
        name = f"g0-{member}-0"
        event = Admitted(
            trajectory=name, task="t", public=PublicPart(messages=[]), private_key="g0"
        )
        seq = await log.append(event, 0)
        await log.append(Expired(trajectory=name, reason="test"), seq)
    await publish_work(bus, run, Trajectory(admitted=event, seq=seq))
    await private.put_private(bus, run, "g0", {"answer": 42})
    await publish_dead(bus, DeadLetter(stage="gen", run=run, error="e", payload=b"p"))
    await blobs.put_blob(bus, run, bytes(2 << 20))
    assets = await policy.publish_assets(bus, run, {"config.json": b"{}"})
    sha256 = await store.put_object(bus, policy.BUCKET, run, b"weights")
    pointer = WeightsPointer(policy_version=0, weights_sha256=sha256, assets_sha256=assets)
    await policy.publish_policy(bus, run, pointer, b"weights")


async def held(bus: Bus, run: str) -> dict[str, int]:
    """Messages of a run by stream."""
    counts = {}
    for stream, subject in (
        ("LOG", f"log.{run}.>"),
        ("GEN", f"gen.{run}"),
        ("DEAD", f"dead.*.{run}"),
        ("KV_policy", f"$KV.policy.{run}.*"),
        ("KV_private", f"$KV.private.{run}.*"),
    ):
        counts[stream] = len([raw async for raw in store.messages(bus, stream, subject)])
    for bucket in ("blobs", "weights"):
        counts[bucket] = len(await store.objects(bus, bucket, run))
    return counts


async def test_a_closed_run_is_copied_whole_and_then_deleted(
    at_home: AtHome, tmp_path: Path
) -> None:
    """The file has every event; the log keeps the run's own; other runs keep theirs."""
    async with at_home() as (bus, log):
        await fill(bus, log)
        await log.append_run(Ended(reason="all steps done"))
        events = [stored.event async for stored in log.read()]
        other = Log(bus, "other", log._reader)
        await fill(bus, other, "other")
        before = await held(bus, "other")
    await archive("test", tmp_path / "kept", "", drop=True, force=False)
    path = tmp_path / "kept" / "test.archive"
    assert path.stat().st_mode & 0o077 == 0, "answers are in it"
    with path.open("rb") as file:
        head, *kept, tail = read_archive(file)
    assert head == Head(run="test")
    assert isinstance(tail, Tail)
    assert tail.messages == len(kept)
    copies = [each for each in kept if isinstance(each, Kept)]
    assert [decode(each.data, AnyEvent) for each in copies if each.stream == "LOG"] == events
    assert {each.stream for each in copies} == {
        "LOG",
        "KV_policy",
        "KV_private",
        "DEAD",
        "OBJ_blobs",
    }
    async with at_home() as (bus, log):
        left = await held(bus, "test")
        assert left == dict.fromkeys(left, 0) | {"LOG": 4}  # opened twice, ended, archived
        assert await held(bus, "other") == before
        assert [s.event async for s in log.read() if isinstance(s.event, Archived)] == [
            Archived(
                replica="operator", messages=tail.messages, sha256=tail.sha256, log_seq=tail.log_seq
            )
        ]


async def test_a_copy_alone_deletes_nothing(at_home: AtHome) -> None:
    """Without --drop, of a run that could be resumed too."""
    async with at_home() as (bus, log):
        await fill(bus, log)
        before = await held(bus, "test")
    await archive("test", None, "", drop=False, force=False)
    path = run_folder.RunFolder("test").path / "test.archive"
    assert check_archive(path, "test").tail.messages > 2 * TRAJECTORIES
    async with at_home() as (bus, log):
        assert await held(bus, "test") == before | {"LOG": before["LOG"] + 1}


async def test_a_live_run_is_refused(at_home: AtHome) -> None:
    async with at_home() as (_, log):
        await log.append_run(Ended(reason="all steps done"))
        with pytest.raises(UserError, match="is alive"):
            await archive("test", None, "", drop=True, force=False)


async def test_a_run_that_could_be_resumed_is_dropped_only_by_force(at_home: AtHome) -> None:
    """And cannot be resumed then."""
    async with at_home() as (bus, log):
        await fill(bus, log)
    with pytest.raises(UserError, match="--force gives that up"):
        await archive("test", None, "", drop=True, force=False)
    async with at_home() as (bus, log):
        assert (await held(bus, "test"))["LOG"] > 2 * TRAJECTORIES
    await archive("test", None, "", drop=True, force=True)
    async with at_home() as (bus, log):
        assert len(await dead_letters(bus, "test")) == 0
        with pytest.raises(UserError, match="choose another"):
            await _open(log, Recipe(policy=Policy(model="m")), "")


async def test_no_run_is_one_clear_error(at_home: AtHome) -> None:
    async with at_home():
        pass
    with pytest.raises(UserError):
        await archive("nowhere", None, "", drop=True, force=False)


async def test_nothing_is_deleted_without_a_whole_file(at_home: AtHome, tmp_path: Path) -> None:
    """A disk that is full, before anything is deleted: the command says so."""
    async with at_home() as (bus, log):
        await fill(bus, log)
        await log.append_run(Ended(reason="all steps done"))
        before = await held(bus, "test")
    script = f"""
import asyncio, resource, signal
from pathlib import Path
from actors import run_folder
from actors.archive import archive
from actors.errors import UserError

run_folder.RUNS = Path({str(run_folder.RUNS)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

async def main():
    from actors.archive import Writer
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    add = Writer.add
    def limited(self, message):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        add(self, message)
    Writer.add = limited
    try:
        await archive("test", Path({str(tmp_path)!r}), "", drop=True, force=False)
    except UserError as error:
        print("REFUSED", error)

asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert "REFUSED" in done.stdout, done.stdout + done.stderr
    assert "nothing was deleted" in done.stdout
    assert not (tmp_path / "test.archive").exists()
    assert not (tmp_path / "test.unfinished").exists()
    async with at_home() as (bus, log):
        assert await held(bus, "test") == before | {"LOG": before["LOG"] + 1}


async def test_a_deletion_that_was_cut_short_goes_on_from_the_file(at_home: AtHome) -> None:
    """The log says that a file was made: it is checked, never written again from what is left."""
    async with at_home() as (bus, log):
        await fill(bus, log)
        await log.append_run(Ended(reason="all steps done"))
    await archive("test", None, "", drop=False, force=False)
    path = run_folder.RunFolder("test").path / "test.archive"
    tail = check_archive(path, "test").tail
    async with at_home() as (bus, log):
        await log.append_run(
            Archived(messages=tail.messages, sha256=tail.sha256, log_seq=tail.log_seq)
        )
        await store.purge(bus, "LOG", "log.test.t.g0-0-0.*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BadArchive, match="cut short"):
        await archive("test", None, "", drop=True, force=False)
    async with at_home() as (bus, log):
        assert (await held(bus, "test"))["LOG"] > 2 * (TRAJECTORIES - 1)
    path.write_bytes(whole)
    await archive("test", None, "", drop=True, force=False)
    assert path.read_bytes() == whole
    async with at_home() as (bus, log):
        assert (await held(bus, "test"))["KV_private"] == 0


async def test_what_the_file_does_not_hold_is_not_deleted(at_home: AtHome) -> None:
    """What a server that was behind has not given, say: of every stream that is copied."""
    async with at_home() as (bus, log):
        await fill(bus, log)
        await log.append_run(Ended(reason="all steps done"))
    await archive("test", None, "", drop=False, force=False)
    tail = check_archive(run_folder.RunFolder("test").path / "test.archive", "test").tail
    async with at_home() as (bus, log):
        await log.append_run(
            Archived(messages=tail.messages, sha256=tail.sha256, log_seq=tail.log_seq)
        )
        late = Admitted(
            trajectory="g1-0-0", task="t", public=PublicPart(messages=[]), private_key="g1"
        )
        await log.append(late, 0)
        await private.put_private(bus, "test", "g1", {"answer": 43})
        await publish_dead(bus, DeadLetter(stage="tool", run="test", error="e", payload=b"q"))
        blob = await blobs.put_blob(bus, "test", b"late")
        await store.put(bus, "policy", "test.v1", b"late")
    await archive("test", None, "", drop=True, force=False)
    async with at_home() as (bus, log):
        left = await held(bus, "test")
        assert (left["KV_private"], left["DEAD"], left["KV_policy"], left["blobs"]) == (1, 1, 1, 1)
        assert await log.trajectory("g1-0-0") is not None
        assert await log.trajectory("g0-0-0") is None
        assert await private.get_private(bus, "test", "g1") == {"answer": 43}
        assert await blobs.get_blob(bus, "test", blob) == b"late"


# -- the file --------------------------------------------------------------------------------------

MESSAGES = st.lists(
    st.builds(
        Kept,
        stream=st.sampled_from(["LOG", "DEAD"]),
        seq=st.integers(1, 2**40),
        time_s=st.floats(0, 2e9),
        subject=st.text(max_size=9),
        data=st.binary(max_size=50),
    ),
    max_size=5,
)


def written(messages: list[Kept], tmp: Path) -> bytes:
    with tmp.open("wb") as file:
        writer = Writer(file, "test")
        for message in messages:
            writer.add(message)
        writer.close()
    return tmp.read_bytes()


@given(MESSAGES)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, messages: list[Kept]
) -> None:
    data = written(messages, tmp_path_factory.getbasetemp() / "a.archive")
    _, *kept, _ = read_archive(io.BytesIO(data))
    assert kept == messages


@given(MESSAGES, st.data())
def test_any_change_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, messages: list[Kept], data: st.DataObject
) -> None:
    """A byte changed, missing or added anywhere: no archive."""
    whole = written(messages, tmp_path_factory.getbasetemp() / "b.archive")
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = data.draw(
        st.sampled_from(
            [whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole + b"\0"]
        )
    )
    with pytest.raises(BadArchive):
        list(read_archive(io.BytesIO(changed)))


@given(st.binary(max_size=100))
def test_other_files_are_no_archives(data: bytes) -> None:
    with pytest.raises(BadArchive):
        list(read_archive(io.BytesIO(data)))
