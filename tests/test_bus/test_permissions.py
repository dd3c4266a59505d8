"""What each role may do at a real server, and everything that it may not: THE TABLE, tried row by row."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from actors.fleet import Fleet
from actors.learner import NAME
from bus import private, store, subjects
from bus.codec import encode
from bus.connection import connect
from bus.embedded import EmbeddedServer
from bus.errors import Denied, Unavailable
from bus.holders import Holders, Key
from bus.log import open_log, open_reader
from bus.permissions import covers, rights
from bus.provision import provision
from bus.subjects import ROLES, TABLE, WORK_STREAMS, Row, streams
from schemas.events import Scored
from schemas.messages import Ask, Heartbeat

RUN = "test"
GUESTS = [role for role in ROLES if role != "provision"]
VICTIM = f"log.{RUN}.t.g0-0-0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One with roles only, provisioned."""
    embedded = EmbeddedServer(tmp_path_factory.mktemp("nats"))
    embedded.start()

    async def make() -> None:
        async with connect(embedded.logins.of("provision"), "test") as bus:
            await provision(bus, RUN, ["python"])

    asyncio.run(make())
    yield embedded
    embedded.stop()


class Attempts:
    """A role's bare connection, and what the server refuses it."""

    def __init__(self, client: Client, refused: list[str]) -> None:
        self.client = client
        self._refused = refused

    async def refused(self) -> set[str]:
        """The subjects, in lower case; all that was tried before has been answered."""
        for _ in range(2):  # the first ping may leave before what was published
            await self.client.flush()
        return {text.split('"')[1] for text in self._refused}


@asynccontextmanager
async def attempts(server: EmbeddedServer, role: str) -> AsyncIterator[Attempts]:
    endpoint = server.logins.of(role)
    refused: list[str] = []

    async def on_error(error: Exception) -> None:
        refused.append(str(error))

    client = await nats.connect(endpoint.url, error_cb=on_error, **endpoint.options())
    yield Attempts(client, refused)
    await client.close()


def example(row: Row, run: str = "other") -> str:
    """A subject of the row."""
    first, *rest = row.subject.split(".")
    return ".".join([first, *(each.replace("*", run) for each in rest)])


async def stored(server: EmbeddedServer) -> dict[str, int]:
    """How many messages each stream holds."""
    async with connect(server.logins.of("provision"), "test") as bus:
        counts = {}
        for stream in streams():
            answer = await bus.request(f"$JS.API.STREAM.INFO.{stream}", b"")
            counts[stream] = json.loads(answer.data)["state"]["messages"]
        return counts


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_publishes_its_rows_and_no_other(server: EmbeddedServer, role: str) -> None:
    """Of every row of the table: what is its own is stored, all else is refused."""
    own = [row for row in TABLE if role in row.publishes]
    async with attempts(server, role) as tries:
        for row in own:
            if row.stream:
                answer = await tries.client.request(example(row), b"x", timeout=10)
                assert json.loads(answer.data).get("stream") == row.stream
        assert await tries.refused() == set()
        for row in TABLE:
            await tries.client.publish(example(row), b"x")
        expected = {example(row) for row in TABLE} - {example(row) for row in own}
        assert await tries.refused() == {subject.lower() for subject in expected}


async def test_a_shadow_is_not_the_run_s_own_learner(server: EmbeddedServer) -> None:
    async with attempts(server, "shadow") as tries:
        await tries.client.publish(subjects.learner(RUN, NAME, "step"), b"x")
        await tries.client.publish(subjects.learner(RUN, "other", "step"), b"x")
        assert await tries.refused() == {subjects.learner(RUN, NAME, "step")}


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_hears_its_rows_and_no_other(server: EmbeddedServer, role: str) -> None:
    """Core subscriptions: the log's, by whoever reads it; never a bucket, a queue or somebody's inbox."""
    may = rights(role).subscribe
    tried = {
        *(example(row) for row in TABLE),
        *(f"_INBOX.{other}.x" for other in ROLES),
        *("log.>", ">", "*", "$KV.>", "$JS.>", "$SYS.>", "_INBOX.>", "_R_.>"),
    }
    async with attempts(server, role) as tries:
        for subject in tried:
            await tries.client.subscribe(subject)
        refused = await tries.refused()
    allowed = {subject for subject in tried if any(covers(each, subject) for each in may)}
    assert refused == {subject.lower() for subject in tried - allowed}
    assert f"_INBOX.{role}.x" in allowed
    assert not {each for each in allowed if each.startswith(("$", "gen.", "tool.", "score."))}
    assert {each for each in allowed if each.startswith("_INBOX")} == {f"_INBOX.{role}.x"}


@pytest.mark.parametrize("role", GUESTS)
async def test_nobody_but_provision_manages(server: EmbeddedServer, role: str) -> None:
    """No stream or consumer is made, changed, emptied, deleted, copied or read around its row."""
    verbs = [
        *("CREATE", "UPDATE", "DELETE", "PURGE", "MSG.DELETE", "MSG.GET", "SNAPSHOT", "RESTORE"),
        *("LEADER.STEPDOWN", "PEER.REMOVE"),
    ]
    tried = {f"$JS.API.STREAM.{verb}.{stream}" for verb in verbs for stream in streams()}
    tried |= {
        f"$JS.API.CONSUMER.{verb}"
        for stream in streams()
        for verb in (
            *(f"CREATE.{stream}", f"CREATE.{stream}.mine", f"CREATE.{stream}.mine.log.{RUN}.>"),
            *(f"DURABLE.CREATE.{stream}.mine", f"DELETE.{stream}.{RUN}", f"LIST.{stream}"),
            *(f"PAUSE.{stream}.{RUN}", f"UNPIN.{stream}.{RUN}", f"RESET.{stream}.{RUN}"),
        )
    }
    tried |= {"$JS.API.STREAM.LIST", "$JS.API.STREAM.NAMES", "$JS.API.ACCOUNT.PURGE.ACTORS"}
    tried |= {"$JS.API.STREAM.CREATE.MINE", "$SYS.REQ.SERVER.PING", "$JS.FC.LOG.x.y"}
    async with attempts(server, role) as tries:
        for subject in tried:
            await tries.client.publish(subject, b"{}")
        assert await tries.refused() == {subject.lower() for subject in tried}


@pytest.mark.parametrize("role", GUESTS)
async def test_a_queue_is_its_stage_s(server: EmbeddedServer, role: str) -> None:
    """Nobody else takes its messages, or acknowledges them, whichever way the subject is written."""
    own = {row.stream for row in TABLE if role in row.consumes}
    tried = set()
    for stream in {*WORK_STREAMS.values()} - own:
        tried |= {
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{RUN}",
            f"$JS.ACK.{stream}.{RUN}.1.1.1.1.0",
            f"$JS.ACK._.hash.{stream}.{RUN}.1.1.1.1.0",
            f"$JS.ACK.hub.hash.{stream}.{RUN}.1.1.1.1.0.token",
        }
    async with attempts(server, role) as tries:
        for subject in tried:
            await tries.client.publish(subject, b"+ACK")
        assert await tries.refused() == {subject.lower() for subject in tried}


async def test_only_scorers_and_the_operator_read_answers(server: EmbeddedServer) -> None:
    async with connect(server.logins.of("dispatcher"), "test") as bus:
        await private.put_private(bus, RUN, "g0", {"answer": "42"})
    for role in GUESTS:
        tried = {
            "$JS.API.DIRECT.GET.KV_private",
            f"$JS.API.DIRECT.GET.KV_private.$KV.private.{RUN}.g0",
        }
        async with attempts(server, role) as tries:
            for subject in tried:
                await tries.client.publish(subject, b'{"seq": 1}')
            allowed = {
                "scorer": {f"$JS.API.DIRECT.GET.KV_private.$KV.private.{RUN}.g0"},
                "operator": tried,
            }.get(role, set())
            assert await tries.refused() == {subject.lower() for subject in tried - allowed}
    async with connect(server.logins.of("scorer"), "test") as bus:
        assert await private.get_private(bus, RUN, "g0") == {"answer": "42"}


async def test_a_key_is_replaced_by_its_own_role_alone(server: EmbeddedServer) -> None:
    """No message makes the server delete what lies on other subjects of a bucket; a store of before loses that, too."""
    async with connect(server.logins.of("provision"), "test") as bus:
        made = (await bus.ask("STREAM.INFO.KV_lease"))["config"]
        await bus.ask("STREAM.UPDATE.KV_lease", made | {"allow_rollup_hdrs": True})
        await provision(bus, RUN, [])
        assert not (await bus.ask("STREAM.INFO.KV_lease"))["config"]["allow_rollup_hdrs"]
    async with connect(server.logins.of("dispatcher"), "test") as bus:
        await store.put(bus, "lease", f"{RUN}.bookmark", b"here")
    async with connect(server.logins.of("recorder"), "test") as bus:
        with pytest.raises(Unavailable):
            await bus.store("$KV.lease.zzz.recorder", b"", {"Nats-Rollup": "all"})
    async with connect(server.logins.of("dispatcher"), "test") as bus:
        kept = await store.get(bus, "lease", f"{RUN}.bookmark")
        assert kept is not None
        assert kept.data == b"here"
    async with connect(server.logins.of("provision"), "test") as bus:
        assert await store.purge(bus, "KV_lease", f"$KV.lease.{RUN}.bookmark") == 1


async def test_analytics_sees_answers_where_it_is_set(tmp_path: Path) -> None:
    """And the log either way; it publishes nothing but to its own inbox."""
    open_server = EmbeddedServer(tmp_path / "nats", analytics_sees_answers=True)
    open_server.start()
    async with connect(open_server.logins.of("provision"), "test") as bus:
        await provision(bus, RUN, [])
    async with connect(open_server.logins.of("dispatcher"), "test") as bus:
        await private.put_private(bus, RUN, "g0", {"answer": "42"})
    async with connect(open_server.logins.of("analytics"), "test") as bus:
        assert await private.get_private(bus, RUN, "g0") == {"answer": "42"}
        async with open_reader(bus, "KV_private") as reader:
            assert len([raw async for raw in reader.read("$KV.private.>")]) == 1
    open_server.stop()
    published = {each for each in rights("analytics").publish if not each.startswith("_INBOX.")}
    assert published == {
        "$JS.API.DIRECT.GET.LOG",
        "$JS.API.DIRECT.GET.LOG.>",
        "ASK.STREAM.INFO.LOG",
    }


# -- ways out --------------------------------------------------------------------------------------

FORGED = encode(Scored(trajectory="g0-0-0", reward=1.0))
ELSEWHERE = [
    *(f"{VICTIM}.scored", f"{VICTIM}.admitted", f"log.{RUN}.r.ended", f"gen.{RUN}", f"score.{RUN}"),
    *(f"tool.{RUN}.python", f"$KV.policy.{RUN}", f"$KV.private.{RUN}.g0", "$O.weights.M.x"),
    *(f"dead.gen.{RUN}", f"weights.{RUN}.ready", "hb.generator.x", f"sess.{RUN}.g0-0-0.python"),
    *(f"_INBOX.{role}.x" for role in GUESTS),
]
"""Where an answer would be a reward, a wake-up, a pointer to weights, an answer to another."""


@pytest.mark.parametrize("role", GUESTS)
async def test_an_answer_is_stored_nowhere(server: EmbeddedServer, role: str) -> None:
    """Whatever a role may ask or publish, with whatever subject for the answer: no stream grows by it.

    A direct get would publish a stored payload there, a pull a work message, a publish its acknowledgement.
    """
    own = next((row for row in TABLE if role in row.publishes and row.stream in _GROWING), None)
    async with attempts(server, "generator") as tries:
        await tries.client.request(MINE, FORGED, timeout=10)
        await tries.client.request(f"gen.{RUN}", FORGED, timeout=10)
    before = await stored(server)
    async with attempts(server, role) as tries:
        for asked in sorted(rights(role).publish):
            if asked.startswith(("$JS.API.", "ASK.")):
                query = {"batch": 1, "no_wait": True} if ".MSG.NEXT." in asked else {"seq": 1}
                subject = asked.replace(".*", f".{RUN}").replace(">", MINE)
                for reply in ELSEWHERE:
                    await tries.client.publish(subject, json.dumps(query).encode(), reply=reply)
        for reply in ELSEWHERE if own else ():
            assert own is not None
            await tries.client.publish(example(own), FORGED, reply=reply)
        assert await tries.refused() == set()
        # of the same connection: whatever was asked before has been answered
        await tries.client.request("$JS.API.DIRECT.GET.LOG", b'{"seq": 1}', timeout=10)
    if own is not None:
        before[own.stream] += len(ELSEWHERE)
    assert await stored(server) == before


MINE = f"log.{RUN}.t.mine.turn"
_GROWING = ("LOG", "GEN", "TOOL", "SCORE", "DEAD")


async def test_an_answer_is_heard_as_nothing(server: EmbeddedServer) -> None:
    """A stored payload or a work message that the server is made to send as a sign of life, a hint or a question."""
    heard: list[Msg] = []

    async def on_message(message: Msg) -> None:
        heard.append(message)

    beat = encode(Heartbeat(run=RUN, role="learner", replica="x", host="", pid=1, up_s=0.0))
    async with (
        connect(server.logins.of("dispatcher"), "test") as bus,
        connect(server.logins.of("toolbox"), "test") as toolbox,
        attempts(server, "generator") as tries,
    ):
        fleet = Fleet()
        await fleet.hear(bus, RUN)
        for subject in ("log.>", "hb.>", "weights.>"):
            await bus.subscribe(subject, on_message)
        holders = Holders(toolbox, RUN, "toolbox-here-1")
        holders.answer = None  # type: ignore[assignment]
        await holders.listen(Key("g0-0-0", "python"))
        ask = encode(Ask(id="1", holder="toolbox-here-1", work=b"x"))
        for payload in (beat, ask):
            answer = await tries.client.request(MINE, payload, timeout=10)
            await tries.client.request(f"gen.{RUN}", payload, timeout=10)
            query = json.dumps({"seq": json.loads(answer.data)["seq"]}).encode()
            for link in (bus, toolbox):
                await link.client.flush()
            heard.clear()
            for reply in ("hb.learner.x", f"weights.{RUN}.ready", f"sess.{RUN}.g0-0-0.python"):
                await tries.client.publish("$JS.API.DIRECT.GET.LOG", query, reply=reply)
                pull = f"$JS.API.CONSUMER.MSG.NEXT.GEN.{RUN}"
                await tries.client.publish(pull, b'{"batch": 3, "no_wait": true}', reply=reply)
            assert await tries.refused() == set()
            await tries.client.request("$JS.API.DIRECT.GET.LOG", b'{"seq": 1}', timeout=10)
        for link in (bus, toolbox):
            await link.client.flush()
        assert [message.subject for message in heard] == []
        assert fleet.alive() == []
        assert holders._at_work == {}
        await holders.close()


async def test_the_server_s_own_headers_are_believed(server: EmbeddedServer) -> None:
    """A message that says in a header where it was stored is read as what it is: junk, and no reward."""
    spoofed = {"Nats-Subject": f"{VICTIM}.scored", "Nats-Sequence": "1"}
    async with (
        connect(server.logins.of("generator"), "test") as bus,
        open_log(bus, "spoofed") as log,
    ):
        seq = await bus.store("log.spoofed.t.g0-0-0.turn", FORGED, spoofed)
        assert [stored async for stored in log.read()] == []
        assert log.junk == 1
        async with open_reader(bus, "LOG") as reader:
            (raw,) = [raw async for raw in reader.read("log.spoofed.>")]
        assert (raw.seq, raw.subject) == (seq, "log.spoofed.t.g0-0-0.turn")


# -- loud ------------------------------------------------------------------------------------------


async def ignore(_: Msg) -> None:
    pass


async def test_a_refusal_ends_the_wait(server: EmbeddedServer) -> None:
    """Storing, asking, subscribing, reading: Denied at once, with role and subject; the link is closed for good."""
    login = server.logins.of("generator")
    with pytest.raises(Denied) as denied:
        async with connect(login, "test") as bus:
            await bus.store(f"{VICTIM}.scored", FORGED)
    assert (denied.value.role, denied.value.subject) == ("generator", f"{VICTIM}.scored")
    assert "generator may not publish to log.test.t.g0-0-0.scored" in str(denied.value)
    with pytest.raises(Denied, match="may not publish to"):
        async with connect(login, "test") as bus:
            await bus.request("$JS.API.STREAM.PURGE.LOG", b"")
    with pytest.raises(Denied, match="may not subscribe to"):
        async with connect(login, "test") as bus:
            await bus.subscribe("$KV.private.>", ignore)
    with pytest.raises(Denied, match="may not publish to"):
        async with connect(login, "test") as bus:
            await store.get(bus, "private", f"{RUN}.g0")


async def test_a_refusal_that_nobody_waits_for_ends_the_block(server: EmbeddedServer) -> None:
    """A core message: `closed` is set, as when the link is lost, and leaving the block says why."""

    async def hint() -> None:
        async with connect(server.logins.of("analytics"), "test") as bus:
            await bus.publish(subjects.ready(RUN), b"")
            await asyncio.wait_for(bus.closed.wait(), 30)

    with pytest.raises(Denied):
        await hint()


async def test_others_go_on_waiting(server: EmbeddedServer) -> None:
    """A refusal ends just the waits for its own subject."""
    outcomes: list[object] = []

    async def both() -> None:
        async with connect(server.logins.of("generator"), "test") as bus:
            stores = [bus.store(f"{VICTIM}.scored", b"x"), bus.store(MINE, b"x")]
            outcomes.extend(await asyncio.gather(*stores, return_exceptions=True))

    with pytest.raises(Denied):
        await both()
    denied, kept = outcomes
    assert isinstance(denied, Denied)
    assert isinstance(kept, int)
