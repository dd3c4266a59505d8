"""One process's link to the server, with nats-py's traps closed.

What nats-py 2.16 does that this file answers: a server that hangs with unsent data is never noticed (issue 671: the
watchdog aborts the transport); exhausted reconnects close in silence (735: `closed` is set and every wait here ends);
`publish_async` loses errors and `flush()` proves nothing (985: every durable publish is a request of its own); what a
role may not do is told to a callback only (595), and what was asked over a link that is lost waits for its answer all
the same (here whoever waits is told at once: see waits.py); a subject that is no text ends the link, and inboxes can be
guessed (see `_Client`).
"""

import asyncio
import json
import math
import re
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import APIError, ServiceUnavailableError
from nats.nuid import NUID

from bus.errors import BusError, Conflict, Full, TooLarge, Unavailable, Unreachable
from bus.permissions import api, covers, inbox
from bus.waits import Waits

log = structlog.get_logger()

T = TypeVar("T")

Message = Msg
"""What callbacks get. What stands in its headers or its subject, anyone may have written who may publish there."""

WRONG_LAST_SEQUENCE = 10071
STORE_FULL = frozenset({10077, 10002, 10023, 10047})
"""A stream is at its own limit, its account is, or the server (10023 is what 2.15 says to a publisher)."""

NO_LEADER = 10008
"""What the servers of a cluster say of a stream for which they choose a leader."""
NO_CONSUMER = 10014
_UNDECIDED = frozenset({10158, 10164})
"""A message of the same id, or one that expects the same sequence, is on its way to the servers of a cluster."""

_CREDENTIALS = re.compile(r"(^|,)(\w+://)?([^/,:@]+)(?::([^,]*))?@")
_ANSWERS = frozenset({"Nats-Stream", "Status"})
"""Headers of what the server itself answers."""
_HEAD_BYTES = len("NATS/1.0\r\n\r\n")
"""Around headers."""
_RETRY_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
_PUBLISH_TIMEOUT_S = 3.0
_LOOK_AGAIN_S = 0.25
_SILENT_S = 2.0
_ELECTION_S = 30.0
"""How long servers may take until they answer: those of a cluster that have just started choose who leads."""
_CONNECT_TIMEOUT_S = 5.0
_DRAIN_TIMEOUT_S = 5.0
_FULL_SAID_S = 10.0
"""How often a publisher that waits for room says so."""
_PING_S = 1.0
_HANG_S = 4.0
"""A connected server that answers no ping for so long is taken for hung."""


async def wait(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event or the time, and return whether it is set.

    Not `asyncio.wait_for`: in Python 3.11 that swallows a cancellation that comes with the event.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a server is and how one role is let in.

    The URL may be printed anywhere: what it says of user and password is moved out of it.
    """

    url: str
    role: str = ""
    """As whom: its inbox is `_INBOX.<role>.>`. Empty: with rights that are not ours to know."""
    seed: str = ""
    """Of an nkey."""
    user: str = ""
    """Instead of a seed; without a password: a token."""
    password: str = ""
    ca: str = ""
    """The file (PEM) of the authority that signed the server's certificate. Empty: no TLS."""

    def __post_init__(self) -> None:
        if found := _CREDENTIALS.search(self.url):
            msgspec.structs.force_setattr(self, "url", _CREDENTIALS.sub(r"\1\2", self.url))
            msgspec.structs.force_setattr(self, "user", self.user or unquote(found[3]))
            msgspec.structs.force_setattr(
                self, "password", self.password or unquote(found[4] or "")
            )

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, role={self.role!r})"  # and no secrets

    def options(self) -> dict[str, Any]:
        """What nats-py is told. Raises OSError when the authority's file cannot be read."""
        options: dict[str, Any] = {}
        if self.seed:
            options["nkeys_seed_str"] = self.seed
        elif self.password:
            options |= {"user": self.user, "password": self.password}
        elif self.user:
            options["token"] = self.user
        if self.ca:
            options["tls"] = ssl.create_default_context(cafile=self.ca)
        if self.role:
            options["inbox_prefix"] = inbox(self.role)
        return options


class _Unguessable(NUID):
    """Others count: who sees one reply subject, as every reader of the log does, would know the next."""

    def next(self) -> bytearray:
        """22 characters, as a NUID has."""
        return bytearray(secrets.token_hex(11), "ascii")


class _Client(Client):
    """nats-py's, for subjects and headers that others have chosen."""

    def __init__(self) -> None:
        super().__init__()
        self._nuid = _Unguessable()

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        return Msg(
            _client=self,
            subject=subject.decode(errors="replace"),
            reply=reply.decode(errors="replace"),
            data=data,
            headers=headers,
            _sid=sid,
        )

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except UnicodeDecodeError:  # a status line that is no text: the other lines count
            return self._parse_header_lines(headers)


class Bus:
    """A connection to NATS; everything else in this package goes through one."""

    def __init__(self, client: Client, endpoint: Endpoint, waits: Waits) -> None:
        self.client = client
        self.url = endpoint.url
        self.api = api(endpoint.role)
        """What the subjects begin with on which it is asked how streams and consumers stand."""
        self.answer_to = waits.answer_to
        """For the block in which an answer is waited for: it ends at once when there will be none."""
        self.linked = waits.linked
        self.closed = asyncio.Event()
        """Set when the link is gone for good: the process should end."""
        self.waits_when_full = False
        """Whether `store` goes on for as long as a stream is full: for those whose work would be lost otherwise."""
        self.full_s = -math.inf
        """When a stream was last found full (monotonic seconds)."""

    def _check_size(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Raises TooLarge. Checked here: for headers beyond the limit, too, the server would cut the link."""
        head = sum(len(f"{key}: {value}\r\n".encode()) for key, value in (headers or {}).items())
        size_bytes = len(data) + (head + _HEAD_BYTES if headers else 0)
        if size_bytes > self.client.max_payload:
            raise TooLarge(subject, size_bytes, self.client.max_payload)

    async def publish(self, subject: str, data: bytes) -> None:
        """Send a core message: at most once, to whoever listens now. Raises TooLarge, Unavailable."""
        self._check_size(subject, data)
        try:
            await self.client.publish(subject, data)
        except NatsError as error:
            raise Unavailable(subject, str(error)) from error

    async def store(
        self,
        subject: str,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        deadline_s: float = 60.0,
    ) -> int:
        """Publish into a stream and return the message's sequence there, trying again until the deadline.

        After a time-out the message may have been stored: give it a message id or an expected sequence. With a
        deadline of 0 it is tried once. Raises Conflict, Denied, Full (see `waits_when_full`), TooLarge, Unavailable.
        """
        self._check_size(subject, data, headers)
        end = time.monotonic() + deadline_s
        said_s = time.monotonic()
        attempt = 0
        while True:
            try:
                return await self._store_once(subject, data, headers)
            except APIError as error:
                if error.err_code == WRONG_LAST_SEQUENCE:
                    expected = (headers or {}).get("Nats-Expected-Last-Subject-Sequence", "0")
                    raise Conflict(subject, int(expected)) from error
                full = error.err_code in STORE_FULL
                again = full or error.err_code in _UNDECIDED
                if not isinstance(error, ServiceUnavailableError) and not again:
                    raise Unavailable(subject, str(error), refused=True) from error
                failure: BusError = (Full if full else Unavailable)(subject, str(error))
            except (NatsError, TimeoutError) as error:
                failure = Unavailable(subject, repr(error))
            now = time.monotonic()
            if isinstance(failure, Full):
                self.full_s = now
                if self.waits_when_full and deadline_s:
                    end = max(end, now + deadline_s)
                if now - said_s > _FULL_SAID_S:
                    said_s = now
                    log.warning("waiting for room", subject=subject, error=str(failure))
            if self.client.is_closed or now > end:
                raise failure
            await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            attempt += 1

    async def _store_once(self, subject: str, data: bytes, headers: dict[str, str] | None) -> int:
        """Raises what nats-py raises."""
        with self.answer_to(subject):
            answer = await self.client.request(
                subject, data, timeout=_PUBLISH_TIMEOUT_S, headers=headers
            )
        confirmed = {}
        # who reads the subject sees where its confirmation goes, and may have the server send something else there
        if not answer.headers and not answer.reply:
            with suppress(ValueError):
                confirmed = json.loads(answer.data)
        if "error" in confirmed:
            raise APIError.from_error(confirmed["error"])
        if "seq" not in confirmed:
            raise NatsError("answered by what is no confirmation")
        return int(confirmed["seq"])

    async def request(self, subject: str, data: bytes, timeout_s: float = 3.0) -> Message:
        """Ask and wait for the one answer. Raises Denied, TooLarge, Unavailable."""
        self._check_size(subject, data)
        try:
            with self.answer_to(subject):
                return await self.client.request(subject, data, timeout=timeout_s)
        except (NatsError, TimeoutError) as error:
            raise Unavailable(subject, repr(error)) from error

    async def patiently(self, do: Callable[[], Awaitable[T]]) -> T:
        """What is harmless to do twice, again while it raises Unavailable: servers start, or choose a leader."""
        begun_s = time.monotonic()
        said = False
        while True:
            try:
                return await do()
            except Unavailable as error:
                waited_s = time.monotonic() - begun_s
                if self.closed.is_set() or waited_s > _ELECTION_S:
                    raise
                if waited_s > _SILENT_S and not said:
                    said = True
                    log.warning("waiting for the server", limit_s=_ELECTION_S, error=str(error))
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def ask(
        self, what: str, query: dict[str, Any] | None = None, *, expected: Collection[int] = ()
    ) -> dict[str, Any]:
        """What JetStream's API answers; a refusal with one of the codes expected is in `error`.

        Raises Denied, Unavailable.
        """
        subject = f"{self.api}.{what}"

        async def read() -> dict[str, Any]:
            message = await self.request(subject, json.dumps(query).encode() if query else b"")
            answer: dict[str, Any] = json.loads(message.data)
            if answer.get("error", {}).get("err_code") == NO_LEADER:
                raise Unavailable(subject, "its stream has no leader")
            return answer

        answer = await self.patiently(read)
        error = answer.get("error")
        if error and error.get("err_code") not in expected:
            raise Unavailable(subject, str(error.get("description")), refused=True)
        return answer

    async def subscribe(self, subject: str, callback: Callable[[Message], Awaitable[None]]) -> None:
        """Call back for each core message, until the connection ends. Raises Denied.

        Not for what the server was made to send there as its answer to somebody: that says so, or has another subject.
        """

        async def on_message(message: Message) -> None:
            if covers(subject, message.subject) and not _ANSWERS.intersection(
                message.headers or ()
            ):
                await callback(message)

        await self.client.subscribe(subject, cb=on_message)
        # suppressed: the link was lost meanwhile; it is subscribed again with the next
        with suppress(NatsError), self.answer_to(subject):
            await self.client.flush()

    async def close(self) -> None:
        """Send what is buffered, if the server is there, and leave."""
        # what drain raises when the link is lost: the transport's own errors too
        with suppress(NatsError, TimeoutError, OSError):
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                await self.client.drain()
        with suppress(NatsError, OSError):
            await self.client.close()  # else it would go on looking for a server


async def _watch(bus: Bus) -> None:
    """Abort a transport whose server has stopped answering, so that nats-py reconnects.

    Messages to ourselves, not pings: nats-py gives up the whole connection when the answer to a ping comes after its
    time-out, and a ping on a transport that is just closing raises whatever the event loop has for it.
    """
    unanswered = 0
    """Rounds and not time: a loop that was blocked, by an import of torch say, has read no answer either."""

    async def hear(_: Message) -> None:
        nonlocal unanswered
        unanswered = 0

    address = bus.client.new_inbox()
    await bus.client.subscribe(address, cb=hear)
    while not await wait(bus.closed, _PING_S):
        if not bus.client.is_connected:
            unanswered = 0
            continue
        with suppress(NatsError):  # it is closing: the next round sees that
            await bus.client.publish(address, b"")
        unanswered += 1
        if unanswered * _PING_S > _HANG_S:
            log.warning("server hangs; reconnecting", url=bus.url)
            unanswered = 0
            # nats-py has no public way to the transport
            writer = getattr(bus.client._transport, "_io_writer", None)
            if writer is not None:
                writer.transport.abort()


@asynccontextmanager
async def connect(endpoint: Endpoint, name: str) -> AsyncIterator[Bus]:
    """A connection for as long as the block runs.

    Raises Unreachable when no server answers at first, and Denied after a block in which the server has refused
    anything: `closed` is set at once then, since no waiting helps.
    """
    bus: Bus | None = None
    waits = Waits(endpoint.role)
    first_errors: list[str] = []

    async def on_error(error: Exception) -> None:
        if bus is None:
            first_errors.append(str(error) or repr(error))
        elif denied := waits.refuse(error):
            log.error("denied", error=str(denied))
            bus.closed.set()
        elif not isinstance(error, (ConnectionError, nats.errors.UnexpectedEOF)):
            log.warning("bus", error=str(error) or repr(error))

    async def on_closed() -> None:
        if bus is not None:
            bus.closed.set()

    async def on_reconnected() -> None:
        log.info("reconnected", url=endpoint.url)
        waits.find_link()

    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            client = _Client()
            await client.connect(
                endpoint.url.split(","),
                name=name,
                **endpoint.options(),
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.25,  # type: ignore[arg-type]  # it sleeps for so long
                connect_timeout=2,
                ping_interval=5,
                max_outstanding_pings=2,
                error_cb=on_error,
                closed_cb=on_closed,
                disconnected_cb=waits.lose_link,
                reconnected_cb=on_reconnected,
            )
    except (NatsError, OSError, TimeoutError, ValueError) as error:
        # a refusal comes between the resets that it causes, and says more than they do
        refused = [text for text in first_errors if "authorization" in text.lower()]
        why = [str(error) or "no answer in time", *first_errors, *refused][-1]
        raise Unreachable(endpoint.url, why) from error
    bus = Bus(client, endpoint, waits)
    watchdog = asyncio.create_task(_watch(bus), name="bus watchdog")
    try:
        yield bus
    finally:
        bus.closed.set()
        await watchdog
        await bus.close()
    if waits.denied is not None:
        raise waits.denied
