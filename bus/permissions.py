"""What each role may do at the server, from THE TABLE: exactly its rows, its own inbox, and what it takes to read them.

    a row of the log       publishes: the subject          consumes: batched direct gets, and the log as hints
    a work queue           publishes: the subject          consumes: pulls of what was provisioned, and acknowledgements
    a key                  publishes: the subject          consumes: direct gets of that key
    an object              publishes, and counts chunks    consumes: batched direct gets
    a core message         publishes: the subject          consumes: the subject

Only `provision` makes, changes, empties or deletes streams and consumers. Nobody deletes a message but by one that
takes its place on a subject where he may publish.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bus.subjects import DEAD_STREAM, EVERYONE, LOG_STREAM, ROLES, TABLE, WORK_STREAMS, Row, streams

API = "$JS.API"
ASK = "ASK"
"""The same for what the server would answer about the roles' own account, which has no streams."""
MANAGER = "provision"
"""Is in the account of the streams itself; see server_config.py."""

_QUEUES = tuple(f"{ASK}.CONSUMER.INFO.{stream}.*" for stream in WORK_STREAMS.values())
_ROOM = (f"{ASK}.INFO", f"{ASK}.STREAM.INFO.{LOG_STREAM}")

_BESIDES: dict[str, tuple[str, ...]] = {
    "dispatcher": (*_ROOM, *_QUEUES),
    "gateway": _ROOM,
    "operator": (_ROOM[1],),
    "analytics": (_ROOM[1],),
}
"""What a role asks the server besides its rows: how full the stores are, how long the queues, where the log ends."""

_NEVER: dict[str, tuple[str, ...]] = {"shadow": ("log.*.l.main.*",)}
"""What a row's `*` would allow."""

_ANSWERS = "KV_private"

_WITHIN = {"_INBOX"} | {
    row.subject.partition(".")[0]
    for row in TABLE
    if not row.stream and row.publishes == row.consumes
}


class Rights(NamedTuple):
    """Patterns of subjects."""

    publish: frozenset[str]
    subscribe: frozenset[str]
    never_publish: frozenset[str] = frozenset()


def api(role: str) -> str:
    """The first part of the subjects on which a role asks how streams and consumers stand."""
    return API if role in ("", MANAGER) else ASK


def inbox(role: str) -> str:
    """Where answers to a role's requests come, and to nobody else's; one more token follows, or several."""
    return f"_INBOX.{role}"


def rights(role: str, *, sees_answers: bool = False) -> Rights:
    """All that a role may do. `sees_answers`: as a scorer does, by listing and by key."""
    publish, subscribe = {f"{inbox(role)}.>"}, {f"{inbox(role)}.>"}
    if role == MANAGER:
        publish |= set(_management())
    else:
        for row in TABLE:
            if role in row.publishes:
                publish |= set(_publishing(row))
            if role in row.consumes or row.consumes == EVERYONE:
                publish |= set(_asking(row))
                subscribe |= set(_hearing(row))
            if role in row.lists or (sees_answers and row.stream == _ANSWERS):
                publish |= set(_whole(row.stream))
        publish |= set(_BESIDES.get(role, ()))
    return Rights(widest(publish), widest(subscribe), frozenset(_NEVER.get(role, ())))


def widest(patterns: Iterable[str]) -> frozenset[str]:
    """Without those that another one covers."""
    found = set(patterns)
    return frozenset(
        each for each in found if not any(covers(other, each) for other in found - {each})
    )


def covers(pattern: str, subject: str) -> bool:
    """Whether a pattern matches a subject, or all that another pattern matches."""
    tokens, others = pattern.split("."), subject.split(".")
    if tokens[-1] == ">":
        tokens.pop()
        others = others[: len(tokens)] if len(others) > len(tokens) else []
    return len(tokens) == len(others) and all(
        token in (other, "*") and other != ">" for token, other in zip(tokens, others, strict=True)
    )


def stays_within(pattern: str) -> bool:
    """Whether it has nothing to do with streams and is between the replicas of one role."""
    return pattern.partition(".")[0] in _WITHIN


def many_answers(pattern: str) -> bool:
    """Whether what is asked for there comes in several messages."""
    return pattern.startswith((f"{API}.DIRECT.GET.", f"{API}.CONSUMER.MSG.NEXT."))


def all_rights(*, analytics_sees_answers: bool = False) -> dict[str, Rights]:
    """Those of every role."""
    return {
        role: rights(role, sees_answers=analytics_sees_answers and role == "analytics")
        for role in ROLES
    }


def _publishing(row: Row) -> Iterator[str]:
    yield row.subject
    if row.stream.startswith("OBJ_"):  # is it there, and whole?
        yield f"{ASK}.STREAM.INFO.{row.stream}"
        yield _last_of(row)


def _asking(row: Row) -> Iterator[str]:
    """What whoever consumes a row asks the server for."""
    if row.stream in WORK_STREAMS.values():
        yield f"{API}.CONSUMER.MSG.NEXT.{row.stream}.*"
        yield f"$JS.ACK.{row.stream}.>"
    elif row.stream in (LOG_STREAM, DEAD_STREAM) or row.stream.startswith("OBJ_"):
        yield from _whole(row.stream)
    elif row.stream:
        yield _last_of(row)


def _whole(stream: str) -> tuple[str, str]:
    """Direct gets of anything in a stream, and of a subject's last message."""
    return f"{API}.DIRECT.GET.{stream}", f"{API}.DIRECT.GET.{stream}.>"


def _last_of(row: Row) -> str:
    return f"{API}.DIRECT.GET.{row.stream}.{row.subject}"


def _hearing(row: Row) -> Iterator[str]:
    """The row's whole family: one subscription may go over several rows."""
    if row.stream in ("", LOG_STREAM):
        yield f"{row.subject.partition('.')[0]}.>"


def _management() -> Iterator[str]:
    yield f"{API}.INFO"
    for stream in streams():
        for verb in ("CREATE", "UPDATE", "INFO", "PURGE", "MSG.DELETE"):
            yield f"{API}.STREAM.{verb}.{stream}"
        if stream.startswith("OBJ_"):  # to delete an object it is found by its name
            yield f"{API}.DIRECT.GET.{stream}"
    for stream in WORK_STREAMS.values():
        for verb in ("CREATE", "DURABLE.CREATE", "INFO", "DELETE"):
            yield f"{API}.CONSUMER.{verb}.{stream}.>"
        yield f"{API}.CONSUMER.LIST.{stream}"
