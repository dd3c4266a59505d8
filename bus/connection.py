"""One process's link to the server, with nats-py's traps closed.

What nats-py 2.16 does that this file answers: a server that hangs with unsent data is never noticed (issue 671: the
watchdog aborts the transport); exhausted reconnects close in silence (735: `closed` is set and every wait here ends);
`publish_async` loses errors and `flush()` proves nothing (985: every durable publish is a request of its own).
"""

import asyncio
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
STREAM_FULL = 10077

_RETRY_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
_PUBLISH_TIMEOUT_S = 3.0
_CONNECT_TIMEOUT_S = 5.0
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

        After a time-out the message may have been stored: give it a message id or an expected sequence.
        Raises Conflict, Full, Unavailable.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        attempt = 0
        while True:
            try:
                ack = await self._jetstream.publish(subject, data, headers=headers)
                return int(ack.seq)
            except APIError as error:
                if error.err_code == WRONG_LAST_SEQUENCE:
                    expected = (headers or {}).get("Nats-Expected-Last-Subject-Sequence", "0")
                    raise Conflict(subject, int(expected)) from error
                full = error.err_code == STREAM_FULL
                if not isinstance(error, ServiceUnavailableError):
                    raise Unavailable(subject, str(error)) from error
                failure: BusError = Full(subject) if full else Unavailable(subject, str(error))
            except (NatsError, TimeoutError, NoStreamResponseError) as error:
                failure = Unavailable(subject, repr(error))
            if self.client.is_closed or loop.time() > end:
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
        await self.client.flush()

    async def close(self) -> None:
        """Send what is buffered and leave."""
        if not self.client.is_closed:
            with suppress(NatsError, TimeoutError):
                await asyncio.wait_for(self.client.drain(), 5.0)


async def _watch(bus: Bus) -> None:
    """Abort a transport whose server has stopped answering, so that nats-py reconnects."""
    loop = asyncio.get_running_loop()
    answered = loop.time()
    while not bus.closed.is_set():
        await wait(bus.closed, 1.0)
        if not bus.client.is_connected:
            answered = loop.time()
            continue
        try:
            await asyncio.wait_for(bus.client.rtt(timeout=1), 1.5)
            answered = loop.time()
        except (NatsError, TimeoutError):
            if loop.time() - answered > _HANG_S:
                log.warning("server hangs; reconnecting", url=bus.url)
                answered = loop.time()
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
