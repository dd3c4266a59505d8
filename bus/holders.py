"""Who holds what one replica keeps for a trajectory: a key names it, and it answers on a subject of its own.

    find    the key's holder, and its revision
    ask     the holder, and wait: it answers when it is done, and several times a second that it is still at it
    take    listen, then set the key, only if its revision is still the one found: one of several wins
    let_go  clear the key, if it is still ours, and listen no more

Nobody listens for a process that is dead, and the server says so at once: a killed holder costs a millisecond, or half
a second when it died with a question in hand. One that hangs is given up after some seconds; it may wake up and still
listen, but by the key it is not who is meant.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import structlog
from nats.errors import ConnectionReconnectingError, NoRespondersError
from nats.errors import Error as NatsError

from bus import store, subjects
from bus.codec import decode, encode
from bus.connection import Bus, Message
from bus.errors import BadMessage, Conflict, Unavailable
from schemas.messages import Answer, Ask

log = structlog.get_logger()

BUCKET = "session"

_SILENCES_S = (0.5, 1.0, 2.0, 4.0)
"""How long each answer is waited for before it is asked again: what died with a question in hand is then known to be
dead, an overloaded holder has time, and after the last it is taken for hung."""
_AT_WORK_S = 0.2
"""How often one that is at work says so: so late is its death noticed."""
_LOST_S = 2.0
"""For so long a holder whose word decides is asked again when nobody listens: it may be about to reconnect."""
_REMEMBERED_S = 10.0
"""For so long an answer can be had again that was lost on its way."""
_TTL_S = 24 * 3600


class Key(NamedTuple):
    """What is held."""

    trajectory: str
    tool: str
    """Its queue; see schemas.events.Call."""


class Held(NamedTuple):
    """What a key says."""

    replica: str = ""
    """Empty: nobody holds it."""
    revision: int = 0


class Holders:
    """One replica among those that hold things."""

    def __init__(self, bus: Bus, run: str, replica: str) -> None:
        self._bus = bus
        self._run = run
        self._replica = replica
        self._listening: dict[Key, Any] = {}
        """With nats-py's subscriptions."""
        self._revisions: dict[Key, int] = {}
        self._at_work: dict[str, asyncio.Task[Answer]] = {}
        """What others have asked, by its id."""
        self._leaving = False
        self.answer: Callable[[Key, Ask], Awaitable[Answer]]
        """What this replica says to what it is asked; to be set before it listens."""

    async def find(self, key: Key) -> Held:
        """Who holds it. Raises Unavailable."""
        value = await store.get(self._bus, BUCKET, self._name(key))
        return Held(value.data.decode(), value.seq) if value else Held()

    async def listen(self, key: Key) -> None:
        """Be there for those who ask; whatever is published from now on, is seen by others after it."""
        if key in self._listening:
            return

        async def on_ask(message: Message) -> None:
            await self._on_ask(key, message)

        self._listening[key] = None
        try:
            self._listening[key] = await self._bus.client.subscribe(
                subjects.session(self._run, *key), cb=on_ask
            )
        except NatsError as error:
            del self._listening[key]
            raise Unavailable(subjects.session(self._run, *key), repr(error)) from error

    async def take(self, key: Key, revision: int) -> bool:
        """Become the holder, if the key has not moved since it was found. Raises BusError."""
        listened = key in self._listening
        await self.listen(key)
        try:
            self._revisions[key] = await store.put(
                self._bus,
                BUCKET,
                self._name(key),
                self._replica.encode(),
                expected_seq=revision,
                ttl_s=_TTL_S,
            )
        except Conflict:
            if not listened:
                await self._stop_listening(key)
            return False
        return True

    async def let_go(self, key: Key) -> None:
        """Hold it no more; whoever needs it next need not ask. Raises BusError but Conflict."""
        await self._stop_listening(key)
        revision = self._revisions.pop(key, None)
        if revision is not None:
            with suppress(Conflict):  # it was taken over
                await store.put(
                    self._bus, BUCKET, self._name(key), b"", expected_seq=revision, ttl_s=1
                )

    async def _stop_listening(self, key: Key) -> None:
        """Listen no more."""
        subscription = self._listening.pop(key, None)
        if subscription is not None:
            with suppress(NatsError):  # the link is gone, and it with it
                await subscription.unsubscribe()

    async def ask(self, key: Key, holder: str, work: bytes, *, run: bool = True) -> Answer | None:
        """What the holder answers: an empty answer when it has run nothing, None when nobody knows whether it has.

        With `run=False` only what came of it is asked, and the answer decides: so nobody is taken for dead too soon.
        Raises Unavailable without a server.
        """
        subject = subjects.session(self._run, *key)
        ask = Ask(id=uuid.uuid4().hex, holder=holder, work=work, run=run)
        now_s = asyncio.get_running_loop().time
        patient_until_s = now_s() if run else now_s() + _LOST_S
        silent = 0
        while True:
            try:
                with self._bus.answer_to(subject):
                    message = await self._bus.client.request(
                        subject, encode(ask), timeout=_SILENCES_S[silent]
                    )
            except NoRespondersError:
                if now_s() >= patient_until_s:
                    return Answer() if ask.work else None
                await asyncio.sleep(_AT_WORK_S)
                continue
            except ConnectionReconnectingError:  # what was asked is asked again over the next link
                ask = Ask(id=ask.id, holder=holder)
                continue
            except (NatsError, TimeoutError) as error:
                if not self._bus.client.is_connected:
                    raise Unavailable(subject, repr(error)) from error
                silent += 1
                if silent == len(_SILENCES_S):
                    return None
                ask = Ask(id=ask.id, holder=holder)
                continue
            answer: Answer = decode(message.data, Answer, subject)
            if not answer.at_work:
                return answer if ask.work or answer != Answer() else None
            ask, silent = Ask(id=ask.id, holder=holder), 0

    async def _on_ask(self, key: Key, message: Message) -> None:
        if message.headers or message.subject != subjects.session(self._run, *key):
            return  # the server's answer to somebody, sent here
        try:
            ask: Ask = decode(message.data, Ask, message.subject)
        except BadMessage as error:
            log.warning("not understood", error=str(error))
            return
        if ask.holder != self._replica:
            return  # somebody has taken it over; our own copy is closed when it is seen to be old
        task = self._at_work.get(ask.id)
        if ask.work and task is None and not (ask.run and self._leaving):
            task = self._begin(key, ask)
        answer = Answer()
        if task is not None:
            await asyncio.wait({task}, timeout=_AT_WORK_S)
            answer = task.result() if task.done() else Answer(at_work=True)
        with suppress(NatsError):  # it is asked again
            await message.respond(encode(answer))

    def _begin(self, key: Key, ask: Ask) -> asyncio.Task[Answer]:
        """On a task of its own: he who asked hears meanwhile that we are alive."""
        loop = asyncio.get_running_loop()
        task = self._at_work[ask.id] = asyncio.ensure_future(self.answer(key, ask))
        task.add_done_callback(
            lambda _: loop.call_later(_REMEMBERED_S, self._at_work.pop, ask.id, None)
        )
        return task

    async def leave(self, within_s: float) -> None:
        """Run nothing more for others, and wait for what they have asked already."""
        self._leaving = True
        if running := [task for task in self._at_work.values() if not task.done()]:
            await asyncio.wait(running, timeout=within_s)

    async def close(self) -> None:
        """End what others have asked; the end of the connection tells them that nobody listens any more."""
        for key in list(self._listening):
            await self._stop_listening(key)
        for task in self._at_work.values():
            task.cancel()
        if self._at_work:
            await asyncio.wait(self._at_work.values())

    def _name(self, key: Key) -> str:
        return f"{self._run}.{key.trajectory}.{key.tool}"
