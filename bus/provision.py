"""Makes the streams, buckets and consumers. Nothing else does, so that no role needs the right to."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    ConsumerInfo,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, BadRequestError, NotFoundError, ServiceUnavailableError

from bus.connection import NO_LEADER, STORE_FULL, Bus
from bus.errors import BusError, Full, Unavailable
from bus.subjects import LOG_STREAM, WORK_STREAMS, durable, streams, token, work

ACK_WAIT_S = 5.0
"""A message whose holder gives no sign for so long is delivered again; holders give one every third of it."""

_STREAM_NAME_IN_USE = 10058
_NO_CLUSTER, _TOO_FEW_SERVERS = 10074, 10005
_NO_JETSTREAM = frozenset({None, 10039, 10076})
"""Nobody answers, or the server says so, of itself or of the account."""


def _stream(name: str, subjects: list[str]) -> StreamConfig:
    config = StreamConfig(
        name=name,
        subjects=subjects,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        allow_direct=True,
    )
    if name in WORK_STREAMS.values():
        config.retention = RetentionPolicy.WORK_QUEUE
        config.duplicate_window = 120
        config.max_msgs = 100_000  # a fuse; room for a limit in bytes would be set aside at once
    elif name.startswith("KV_"):
        config.max_msgs_per_subject = 1
        # said, so that an older stream loses it: one role could empty the others' keys
        config.allow_rollup_hdrs = False
        config.allow_msg_ttl = True
    elif name.startswith("OBJ_"):
        config.allow_rollup_hdrs = True
        config.allow_msg_ttl = True
    return config


async def _make(manager: JetStreamContext, config: StreamConfig) -> None:
    """Make a stream, or bring it up to date; a limit not given stays as it is, and replicas do not get fewer."""
    name = str(config.name)
    try:
        try:
            await manager.add_stream(config)
        except BadRequestError as error:
            if error.err_code != _STREAM_NAME_IN_USE:
                raise
            known = (await manager.stream_info(name)).config
            if config.max_bytes is None:
                config.max_bytes = known.max_bytes
            config.num_replicas = max(config.num_replicas or 1, known.num_replicas or 1)
            await manager.update_stream(config)
    except APIError as error:
        if error.err_code in (_NO_CLUSTER, _TOO_FEW_SERVERS):
            key = f"nats.replicas = {config.num_replicas}"
            why = (
                f"the server is no cluster of so many ({error.description}); "
                "give the URLs of one, `--nats URL,URL,URL`, or set nats.replicas = 1"
            )
            if error.err_code == _TOO_FEW_SERVERS:  # the others may come yet
                raise Unavailable(key, why) from error
            raise BusError(f"{key}: {why}") from error
        if error.err_code in STORE_FULL:
            raise Full(name, f"the server cannot set {config.max_bytes} bytes aside") from error
        raise


async def provision(
    bus: Bus,
    run: str,
    tools: Sequence[str],
    *,
    log_limit_bytes: int | None = None,
    replicas: int = 1,
) -> None:
    """Make what the deployment and one run of it need; harmless when it is there already.

    The limit is that of the log of all runs; without one it stays as it is, at first unlimited.
    `replicas`: how many servers of a cluster hold each stream, at least. Raises Full when the server has no room for
    the limit, Unavailable, and BusError when there are not so many servers, or none has JetStream.
    """
    token(run, "the run's name")
    await _managed(bus, partial(_provision, bus, run, tools, log_limit_bytes, replicas))


async def _managed(bus: Bus, do: Callable[[], Awaitable[None]]) -> None:
    """Do what is harmless to do twice, as servers that choose a leader take it."""

    async def once() -> None:
        with _translated(bus.url):
            await do()

    await bus.patiently(once)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """What the client raises, as one of ours."""
    try:
        yield
    except (NatsError, TimeoutError) as error:
        if isinstance(error, ServiceUnavailableError) and error.err_code in _NO_JETSTREAM:
            raise BusError(
                f"the server at {url} has no JetStream: start it with -js, or as `actors nats-conf` configures it"
            ) from error
        if isinstance(error, APIError) and error.err_code != NO_LEADER:
            raise BusError(f"the server at {url} refuses: {error.description}") from error
        raise Unavailable(url, str(error) or repr(error)) from error


async def _provision(
    bus: Bus, run: str, tools: Sequence[str], log_limit_bytes: int | None, replicas: int
) -> None:
    manager = bus.client.jetstream(timeout=10.0)
    for name, subjects in streams().items():
        config = _stream(name, subjects)
        config.num_replicas = replicas
        if name == LOG_STREAM:
            config.max_bytes = log_limit_bytes
        await _make(manager, config)
    wanted = [("GEN", durable(run), work("gen", run)), ("SCORE", durable(run), work("score", run))]
    for tool in tools:
        for part in tool.split("@"):  # its name, and a version
            token(part, "the tool's name")
        wanted.append(("TOOL", durable(run, tool), work("tool", run, tool)))
    for stream, name, subject in wanted:
        try:
            await manager.consumer_info(stream, name)
        except NotFoundError:
            await manager.add_consumer(
                stream,
                ConsumerConfig(
                    durable_name=name,
                    filter_subject=subject,
                    ack_policy=AckPolicy.EXPLICIT,
                    ack_wait=ACK_WAIT_S,
                    max_ack_pending=20_000,
                    max_waiting=4096,
                ),
            )


async def delete_consumers(bus: Bus, run: str) -> None:
    """Delete what `provision` made for a run; the streams are everyone's and stay. Raises BusError."""
    await _managed(bus, partial(_delete_consumers, bus, run))


async def _delete_consumers(bus: Bus, run: str) -> None:
    manager = bus.client.jetstream(timeout=10.0)
    for stage, stream in WORK_STREAMS.items():
        found: list[ConsumerInfo] = []
        while page := await manager.consumers_info(stream, len(found)):
            found += page
        for info in found:
            subject = str(info.config.filter_subject)
            if subject == work(stage, run) or subject.startswith(f"tool.{run}."):
                await manager.delete_consumer(stream, info.name)
