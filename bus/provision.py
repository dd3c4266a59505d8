"""Makes the streams, buckets and consumers. Nothing else does, so that no role needs the right to."""

from collections.abc import Sequence

from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import BadRequestError, NotFoundError

from bus.connection import Bus
from bus.subjects import WORK_STREAMS, durable, streams, token, work

ACK_WAIT_S = 10.0
"""A message whose holder gives no sign for so long is delivered again; holders give one every third of it."""

_STREAM_NAME_IN_USE = 10058


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
        config.max_bytes = 8 << 30
    elif name.startswith("KV_"):
        config.max_msgs_per_subject = 1
        config.allow_rollup_hdrs = True
        config.allow_msg_ttl = True
    elif name.startswith("OBJ_"):
        config.allow_rollup_hdrs = True
    return config


async def provision(bus: Bus, run: str, tools: Sequence[str]) -> None:
    """Make what the deployment and one run of it need; harmless when it is there already."""
    token(run, "the run's name")
    manager = bus.client.jetstream(timeout=10.0)
    for name, subjects in streams().items():
        try:
            await manager.add_stream(_stream(name, subjects))
        except BadRequestError as error:
            if error.err_code != _STREAM_NAME_IN_USE:
                raise
            await manager.update_stream(_stream(name, subjects))
    wanted = [("GEN", durable(run), work("gen", run)), ("SCORE", durable(run), work("score", run))]
    for tool in tools:
        name = durable(run, token(tool, "the tool's name"))
        wanted.append(("TOOL", name, work("tool", run, tool)))
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
