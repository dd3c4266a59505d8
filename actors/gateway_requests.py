"""What VerlTool's client sends to `POST /get_observation`, and what it is answered. Knows no bus and no HTTP."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta


class BadRequest(Exception):
    """A request that cannot be read; `detail` says where and why, in the shape of FastAPI's answers."""

    def __init__(self, why: str, *where: str | int) -> None:
        super().__init__(f"{'.'.join(map(str, where)) or 'body'}: {why}")
        self.detail = [{"type": "value_error", "loc": ["body", *where], "msg": why}]


class Action(NamedTuple):
    """What one policy wrote in one turn."""

    trajectory: str
    """As its trainer calls it."""
    text: str
    extra: dict[str, Any] = {}
    finish: bool = False
    """Nothing is to be done but to end the trajectory."""
    last: bool = False
    """The trajectory ends with this action."""


class Answer(NamedTuple):
    """What becomes of an action."""

    observation: str | dict[str, Any]
    done: bool
    valid: bool
    tool: str = ""
    """Which one was called first; the client is not told."""
    cause: str = ""
    """Why it could not be called, when infrastructure failed."""


class _Body(msgspec.Struct):
    trajectory_ids: list[str] | str
    """Some of VerlTool's versions finish a trajectory by its bare id."""
    actions: Annotated[list[str], Meta(min_length=1)]
    extra_fields: list[dict[str, Any]] | None = None
    finish: list[bool] | None = None
    is_last_step: list[bool] | None = None


class Reply(msgspec.Struct):
    """The answer to a request; lists in the order of its actions."""

    observations: list[str | dict[str, Any]]
    dones: list[bool]
    valids: list[bool]
    processing_time_ms: float
    queue_time_ms: float


_AT = re.compile(r"(.*) - at `\$(.*)`", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


def read_request(body: bytes) -> list[Action]:
    """The actions of a request, in order; keys that are not known are ignored. Raises BadRequest."""
    try:
        # not strict: 0, 1 and "true" are booleans here, as they are to pydantic
        read = msgspec.json.decode(body, type=_Body, strict=False)
    except msgspec.ValidationError as error:
        at = _AT.fullmatch(str(error))
        steps = _STEP.findall(at[2]) if at else []
        where = [name or int(index) for name, index in steps]
        raise BadRequest(at[1] if at else str(error), *where) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadRequest(f"not JSON: {error}") from error
    ids = [read.trajectory_ids] if isinstance(read.trajectory_ids, str) else read.trajectory_ids
    count = len(ids)
    for name in ("actions", "extra_fields", "finish", "is_last_step"):
        values = getattr(read, name)
        if values is not None and len(values) != count:
            raise BadRequest(
                f"Length of {name} must match trajectory_ids: {len(values)} and {count}", name
            )
    extras = read.extra_fields or [{}] * count
    for index, extra in enumerate(extras):
        try:
            msgspec.msgpack.encode(extra)
        except OverflowError as error:  # JSON, and no message of the bus
            raise BadRequest("a number is beyond 64 bits", "extra_fields", index) from error
    finish = read.finish or [False] * count
    last = read.is_last_step or [False] * count
    return [
        Action(
            trajectory=ids[index],
            text=read.actions[index],
            extra=extra,
            finish=finish[index] or extra.get("finish") is True,
            last=last[index] or extra.get("is_last_step") is True,
        )
        for index, extra in enumerate(extras)
    ]


def reply_to(answers: Sequence[Answer], processing_ms: float, queue_ms: float) -> bytes:
    """The body of the response."""
    reply = Reply(
        observations=[answer.observation for answer in answers],
        dones=[answer.done for answer in answers],
        valids=[answer.valid for answer in answers],
        processing_time_ms=processing_ms,
        queue_time_ms=queue_ms,
    )
    return msgspec.json.encode(reply)
