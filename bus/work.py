"""Wake-ups: one durable work queue per (stage, run[, tool]), pulled by every replica of the stage.

A queue keeps one inbox for life and asks for as many messages as it has free slots, so that no answer is ever an
orphan (nats-py issue 986: `fetch(batch>1)` stalls on them). Losing an acknowledgement costs a redelivery, which the
commit rule of the log makes harmless.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from nats.errors import Error as NatsError

from bus import subjects
from bus.codec import decode, encode
from bus.connection import NO_CONSUMER, Bus, Message, wait
from bus.provision import ACK_WAIT_S
from bus.subjects import Stage
from schemas.messages import Work
from schemas.trajectory import Trajectory

STATE_LIMIT_BYTES = 512 << 10
"""A work message above it carries the sequence only."""

_PULL_EXPIRES_S = 5.0
_IDLE_HEARTBEAT_S = 1.0
_IDLE, _EXPIRED = "100", "408"
"""What the server says of a request that is well: it waits on, or has waited for as long as it was to."""


def work_message(state: Trajectory, failures: int = 0, *, with_state: bool = True) -> bytes:
    """The wake-up for a trajectory's next hop."""
    if with_state:
        data = encode(Work(trajectory=state.id, seq=state.seq, state=state, failures=failures))
        if len(data) <= STATE_LIMIT_BYTES:
            return data
    return encode(Work(trajectory=state.id, seq=state.seq, failures=failures))


async def publish_work(
    bus: Bus, run: str, state: Trajectory, *, failures: int = 0, again: bool = False
) -> None:
    """Wake the stage of the trajectory's next hop, if it has one.

    Two replicas that publish the same hop leave one message; with `again` it is never taken for an echo, and is
    folded from the log by whoever takes it: it may have lain behind the first one.
    """
    hop = state.next_hop
    if hop is None:
        return
    stage: Stage = hop.stage  # type: ignore[assignment]
    headers = None if again else {"Nats-Msg-Id": f"{run}.{state.id}.{state.seq}.{failures}"}
    data = work_message(state, failures, with_state=not again)
    await bus.store(subjects.work(stage, run, hop.tool), data, headers)


class Delivery:
    """One message taken from a queue; it must be finished by `done` or `give_back`."""

    def __init__(self, queue: "WorkQueue", message: Message) -> None:
        self._queue = queue
        self._message = message
        self.payload = message.data
        self.subject = message.subject
        self.deliveries = message.metadata.num_delivered
        """1 for the first; each holder that died, hung or gave it back adds one."""
        self.redelivered = self.deliveries > 1

    def work(self) -> Work:
        """What it says. Raises BadMessage."""
        return decode(self.payload, Work, self.subject)

    async def done(self) -> None:
        """It never comes again."""
        await self._finish(self._message.ack())

    async def give_back(self, delay_s: float = 0.0) -> None:
        """Another replica, or this one later, takes it."""
        await self._finish(self._message.nak(delay=delay_s or None))

    async def keep(self) -> None:
        """Tell the server that it is still being worked on."""
        with suppress(NatsError):
            await self._message.in_progress()

    async def _finish(self, acknowledgement: object) -> None:
        self._queue._release(self)
        with suppress(
            NatsError
        ):  # unknown outcome: a redelivery, which finds that the log has moved
            await acknowledgement  # type: ignore[misc]


class WorkQueue:
    """Takes a stage's messages, at most `slots` at a time. Made by `open_queue`."""

    def __init__(self, bus: Bus, stream: str, durable: str, slots: int) -> None:
        self._bus = bus
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._slots = slots
        self._address = bus.client.new_inbox()
        self._asked = 0
        """Messages asked for that have neither come nor been declined."""
        self._arrived: asyncio.Queue[Message] = asyncio.Queue()
        self._wake = asyncio.Event()
        self._released = asyncio.Event()
        self._heard_s = 0.0
        self._draining = False
        self.held: set[Delivery] = set()

    async def take(self) -> Delivery:
        """The next message; waits for one and for a free slot."""
        message = await self._arrived.get()
        delivery = Delivery(self, message)
        self.held.add(delivery)
        return delivery

    def drain(self) -> None:
        """Ask for no more; what arrives all the same is given back."""
        self._draining = True

    async def empty(self) -> None:
        """Until nothing is held."""
        while self.held:
            self._released.clear()
            await self._released.wait()

    def forget(self) -> None:
        """Ask again: what was asked over the link that was lost is answered over no other."""
        self._asked = 0
        self._wake.set()

    def _release(self, delivery: Delivery) -> None:
        self.held.discard(delivery)
        self._released.set()
        self._wake.set()

    async def _on_message(self, message: Message) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        if message.reply.startswith("$JS.ACK."):
            self._asked = max(0, self._asked - 1)
            self._wake.set()
            if self._draining:
                with suppress(NatsError):
                    await message.nak()
            else:
                self._arrived.put_nowait(message)
            return
        headers = message.headers or {}
        status = headers.get("Status")
        if status != _IDLE:  # all else ends a request, saying what it owes
            owed = int(headers.get("Nats-Pending-Messages", self._asked))
            self._asked = max(0, self._asked - owed)
            if status == _EXPIRED:  # else it was refused, and would be again at once: see `_pull`
                self._wake.set()

    async def _pull(self) -> None:
        """Ask for as many messages as there are free slots, for ever."""
        loop = asyncio.get_running_loop()
        while not self._bus.closed.is_set():
            self._wake.clear()
            now = loop.time()
            if self._asked and now - self._heard_s > 3 * _IDLE_HEARTBEAT_S:
                self._asked = 0  # the server has forgotten us, or restarted
            free = self._slots - len(self.held) - self._arrived.qsize() - self._asked
            if free > 0 and self._asked <= free // 2 and not self._draining:
                await self._ask(free)
                self._heard_s = now
            await wait(self._wake, _IDLE_HEARTBEAT_S)

    async def _ask(self, count: int) -> None:
        query = {
            "batch": count,
            "expires": int(_PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(_IDLE_HEARTBEAT_S * 1e9),
        }
        with suppress(NatsError):  # not connected: asked again within a second
            await self._bus.client.publish(
                self._subject, json.dumps(query).encode(), reply=self._address
            )
            self._asked += count

    async def _keep_alive(self) -> None:
        """Tell the server of everything held, well before it would deliver it again."""
        while not self._bus.closed.is_set():
            await wait(self._bus.closed, ACK_WAIT_S / 3)
            for delivery in list(self.held):
                await delivery.keep()


@asynccontextmanager
async def open_queue(
    bus: Bus, stage: Stage, run: str, tool: str = "", *, slots: int
) -> AsyncIterator[WorkQueue]:
    """A stage's queue for as long as the block runs; what is still held then is given back."""
    queue = WorkQueue(bus, subjects.WORK_STREAMS[stage], subjects.durable(run, tool), slots)
    inbox = await bus.client.subscribe(
        queue._address, cb=queue._on_message, pending_msgs_limit=0, pending_bytes_limit=0
    )
    tasks = [
        asyncio.create_task(queue._pull(), name="pull"),
        asyncio.create_task(queue._keep_alive(), name="keep alive"),
    ]
    bus.linked.add(queue.forget)
    try:
        yield queue
    finally:
        bus.linked.discard(queue.forget)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for delivery in list(queue.held):
            await delivery.give_back()
        while not queue._arrived.empty():
            with suppress(NatsError):
                await queue._arrived.get_nowait().nak()
        with suppress(NatsError):
            await inbox.unsubscribe()


class Queue(NamedTuple):
    """How a work queue stands."""

    waiting: int = 0
    """Messages that nobody has taken yet."""
    taken: int = 0
    """Messages given out so far, those given out again included."""


async def backlog(bus: Bus, run: str, tools: Sequence[str]) -> dict[str, Queue]:
    """The queues of a run, by `gen`, `score` and `tool.<name>`. Raises Unavailable."""
    stages: list[tuple[Stage, str]] = [("gen", ""), ("score", ""), *(("tool", t) for t in tools)]
    queues = {}
    for stage, tool in stages:
        stream = subjects.WORK_STREAMS[stage]
        name = subjects.durable(run, tool)
        info = await bus.ask(f"CONSUMER.INFO.{stream}.{name}", expected={NO_CONSUMER})
        if "error" not in info:
            taken = int(info["delivered"]["consumer_seq"])
            queues[f"tool.{tool}" if tool else stage] = Queue(int(info["num_pending"]), taken)
    return queues
