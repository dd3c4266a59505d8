"""One process's link to the server, with nats-py's traps closed.

What nats-py 2.16 does that this file answers: a server that hangs with unsent data is never noticed (issue 671: the
watchdog aborts the transport); exhausted reconnects close in silence (735: `closed` is set and every wait here ends);
`publish_async` loses errors and `flush()` proves nothing (985: every durable publish is a request of its own).
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import msgspec
import nats
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.errors import APIError, NoStreamResponseError, ServiceUnavailableError

from bus.errors import BusError, Conflict, Full, Unavailable, Unreachable

log = structlog.get_logger()

Message = Msg
"""What callbacks get."""

WRONG_LAST_SEQUENCE = 10071
STORE_FULL = frozenset({10077, 10023, 10047})
"""A stream is at its own limit, or the server at that of its whole store (10023 is what 2.15 says to a publisher)."""

_RETRY_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
_PUBLISH_TIMEOUT_S = 3.0
_CONNECT_TIMEOUT_S = 5.0
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


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server is and how to be let in; what `endpoint.json` of a live run holds."""

    url: str
    user: str = ""
    password: str = ""


class Bus:
    """A connection to NATS; everything else in this package goes through one."""

    def __init__(self, client: Client, url: str) -> None:
        self.client = client
        self.url = url
        self.closed = asyncio.Event()
        """Set when the link is gone for good: the process should end."""
        self.waits_when_full = False
        """Whether `store` goes on for as long as a stream is full: for those whose work would be lost otherwise."""
        self.full_s = -math.inf
        """When a stream was last found full (monotonic seconds)."""
        self._jetstream = client.jetstream(timeout=_PUBLISH_TIMEOUT_S)

    async def publish(self, subject: str, data: bytes) -> None:
        """Send a core message: at most once, to whoever listens now."""
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
        deadline of 0 it is tried once. Raises Conflict, Full (see `waits_when_full`), Unavailable.
        """
        end = time.monotonic() + deadline_s
        said_s = time.monotonic()
        attempt = 0
        while True:
            try:
                ack = await self._jetstream.publish(subject, data, headers=headers)
                return int(ack.seq)
            except APIError as error:
                if error.err_code == WRONG_LAST_SEQUENCE:
                    expected = (headers or {}).get("Nats-Expected-Last-Subject-Sequence", "0")
                    raise Conflict(subject, int(expected)) from error
                full = error.err_code in STORE_FULL
                if not isinstance(error, ServiceUnavailableError) and not full:
                    raise Unavailable(subject, str(error)) from error
                failure: BusError = (Full if full else Unavailable)(subject, str(error))
            except (NatsError, TimeoutError, NoStreamResponseError) as error:
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

    async def request(self, subject: str, data: bytes, timeout_s: float = 3.0) -> Message:
        """Ask and wait for the one answer. Raises Unavailable."""
        try:
            return await self.client.request(subject, data, timeout=timeout_s)
        except (NatsError, TimeoutError, NoRespondersError) as error:
            raise Unavailable(subject, repr(error)) from error

    async def subscribe(self, subject: str, callback: Callable[[Message], Awaitable[None]]) -> None:
        """Call back for each core message, until the connection ends."""
        await self.client.subscribe(subject, cb=callback)
        with suppress(
            NatsError
        ):  # the link was lost meanwhile: it is subscribed again with the next
            await self.client.flush()

    async def close(self) -> None:
        """Send what is buffered and leave."""
        if not self.client.is_closed:
            with suppress(NatsError, TimeoutError):
                await asyncio.wait_for(self.client.drain(), 5.0)


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
    """A connection for as long as the block runs. Raises Unreachable when no server answers at first."""
    bus: Bus | None = None
    first_errors: list[str] = []

    async def on_error(error: Exception) -> None:
        if bus is None:
            first_errors.append(str(error) or repr(error))
        elif not isinstance(error, (ConnectionError, nats.errors.UnexpectedEOF)):
            log.warning("bus", error=str(error) or repr(error))

    async def on_closed() -> None:
        if bus is not None:
            bus.closed.set()

    async def on_reconnected() -> None:
        log.info("reconnected", url=endpoint.url)

    try:
        client = await asyncio.wait_for(
            nats.connect(
                endpoint.url,
                name=name,
                user=endpoint.user or None,
                password=endpoint.password or None,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.25,
                connect_timeout=2,
                ping_interval=5,
                max_outstanding_pings=2,
                error_cb=on_error,
                closed_cb=on_closed,
                reconnected_cb=on_reconnected,
            ),
            _CONNECT_TIMEOUT_S,
        )
    except (NatsError, OSError, TimeoutError, ValueError) as error:
        # a refusal comes between the resets that it causes, and says more than they do
        refusals = [text for text in first_errors if "authorization" in text.lower()]
        why = [str(error) or "no answer in time", *first_errors, *refusals][-1]
        raise Unreachable(endpoint.url, why) from error
    bus = Bus(client, endpoint.url)
    watchdog = asyncio.create_task(_watch(bus), name="bus watchdog")
    try:
        yield bus
    finally:
        bus.closed.set()
        await watchdog
        await bus.close()
