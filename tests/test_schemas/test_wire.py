"""What travels: every message and event through the codec, and through a msgpack that is not ours."""

import struct
from contextlib import suppress
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import subjects
from bus.codec import decode, encode
from bus.errors import BadMessage
from schemas import messages
from schemas.events import (
    OWNERS,
    TERMINAL,
    AnyEvent,
    AnyLearnerEvent,
    AnyRunEvent,
    AnyTrajectoryEvent,
    Call,
    Evaluated,
    Event,
    Result,
    Scored,
    Turn,
)
from schemas.messages import RoleName, Work
from schemas.recipe import Recipe
from schemas.task import TaskRow
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory

KINDS: tuple[type[Event], ...] = AnyEvent.__args__
MESSAGES = tuple(
    value
    for value in vars(messages).values()
    if isinstance(value, type)
    and issubclass(value, msgspec.Struct)
    and value.__module__ == messages.__name__
)
EVERYTHING = (*KINDS, *MESSAGES, Recipe, TaskRow, Trajectory)

events = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
few = settings(max_examples=12)
"""Of each of many classes."""


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERYTHING, ids=lambda kind: kind.__name__)
@given(data=st.data())
@few
def test_what_is_sent_is_what_comes(kind: type[Any], data: st.DataObject) -> None:
    """Every message and every event survives the wire, field by field."""
    message = data.draw(st.from_type(kind))
    assert decode(encode(message), kind) == message


@given(st.from_type(AnyEvent))
def test_an_event_is_read_as_its_own_kind(event: Event) -> None:
    """A reader that asks for any event gets the class that was sent."""
    read = decode(encode(event), AnyEvent)
    assert type(read) is type(event)
    assert read == event


@given(st.from_type(Turn))
def test_any_language_reads_a_turn(turn: Turn) -> None:
    """Plain msgpack gives a map; its token arrays are packed, little-endian, in the widths documented."""
    told = msgpack.unpackb(encode(turn))
    assert told["kind"] == "turn"
    assert told["trajectory"] == turn.trajectory
    assert told["text"] == turn.text
    assert told["calls"] == [
        {"tool": call.tool, "arguments": call.arguments}
        | ({"version": call.version} if call.version else {})
        for call in turn.calls
    ]
    tokens, count = told["tokens"], len(turn.tokens)
    assert list(struct.unpack(f"<{count}i", tokens["ids"])) == list(turn.tokens.ids_T)
    assert list(struct.unpack(f"<{count}f", tokens["logprobs"])) == list(turn.tokens.logprobs_T)
    assert list(struct.unpack(f"<{count}i", tokens["versions"])) == list(turn.tokens.versions_T)
    assert list(struct.unpack(f"<{count}B", tokens["mask"])) == list(turn.tokens.mask)


@pytest.mark.parametrize("kind", EVERYTHING, ids=lambda kind: kind.__name__)
@given(data=st.data())
@few
def test_any_language_reads_and_writes_everything(kind: type[Any], data: st.DataObject) -> None:
    """What another implementation of msgpack makes of a message, and writes again, is the same message."""
    message = data.draw(st.from_type(kind))
    told = msgpack.unpackb(encode(message))
    assert isinstance(told, dict)
    assert decode(msgpack.packb(told), kind) == message


# -- old and new processes talk --------------------------------------------------------------------


@events
@given(data=st.data())
@few
def test_a_field_that_is_not_known_is_ignored(kind: type[Event], data: st.DataObject) -> None:
    """An event of a newer process is readable here."""
    event = data.draw(st.from_type(kind))
    newer = msgpack.unpackb(encode(event)) | {"a_field_of_tomorrow": {"x": [1]}}
    assert decode(msgpack.packb(newer), AnyEvent) == event


@events
@given(data=st.data())
@few
def test_a_field_that_is_missing_takes_its_default(kind: type[Event], data: st.DataObject) -> None:
    """An event of an older process, without the fields that have defaults, is readable here."""
    event = data.draw(st.from_type(kind))
    required = {f.encode_name for f in msgspec.structs.fields(kind) if f.required}
    told = msgpack.unpackb(encode(event))
    older = {name: value for name, value in told.items() if name in {*required, "kind"}}
    expected = kind(**{name: getattr(event, name) for name in required})
    assert decode(msgpack.packb(older), AnyEvent) == expected


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"kind": "scored", "trajectory": 7, "reward": 1.0}, "$.trajectory"),
        ({"kind": "scored", "trajectory": "g0-0-0", "reward": "high"}, "$.reward"),
        ({"kind": "scored", "trajectory": "g0-0-0"}, "missing required field `reward`"),
        ({"kind": "applauded", "trajectory": "g0-0-0"}, "Invalid value 'applauded' - at `$.kind`"),
        ({"trajectory": "g0-0-0"}, "missing required field `kind`"),
        (
            {"kind": "turn", "trajectory": "g0-0-0", "text": "", "tokens": {"ids": b"1234"}},
            "4 bytes a token and mask 1, not 4, 0, 0, 0 - at `$.tokens`",
        ),
        (
            {
                "kind": "turn",
                "trajectory": "g0-0-0",
                "text": "",
                "tokens": {},
                "calls": [{"tool": "python", "arguments": {}}, {"tool": 3, "arguments": {}}],
            },
            "$.calls[1].tool",
        ),
        (
            {
                "kind": "failed",
                "trajectory": "g0-0-0",
                "cause": {"boundary": "weather", "code": "rain"},
            },
            "Invalid enum value 'weather' - at `$.cause.boundary`",
        ),
        ([], "Expected `object`, got `array`"),
        (None, "got `None`"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(message: object, path: str) -> None:
    """A value of another type is a BadMessage that says where it is."""
    with pytest.raises(BadMessage) as caught:
        decode(msgpack.packb(message), AnyEvent, "log.r.t.g0-0-0.x")
    assert path in str(caught.value)
    assert str(caught.value).startswith("log.r.t.g0-0-0.x: ")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Whatever comes is an event or a BadMessage."""
    with suppress(BadMessage):
        assert isinstance(decode(data, AnyEvent), Event)


@given(st.from_type(Turn), st.data())
def test_a_message_that_was_cut_is_bad(turn: Turn, data: st.DataObject) -> None:
    """Every true prefix of a message is refused."""
    whole = encode(turn)
    with pytest.raises(BadMessage):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))], AnyEvent)


# -- the vocabulary --------------------------------------------------------------------------------


def test_every_kind_has_one_owner() -> None:
    """The role that may append it, which is a role."""
    assert set(OWNERS) == set(KINDS)
    assert set(OWNERS.values()) <= {*RoleName.__args__, "operator"}


def test_kinds_are_told_apart_by_their_place() -> None:
    """A trajectory's, a learner's and the run's kinds do not overlap, and together are all."""
    groups = [set(union.__args__) for union in (AnyTrajectoryEvent, AnyLearnerEvent, AnyRunEvent)]
    assert set.union(*groups) == set(KINDS)
    assert sum(map(len, groups)) == len(KINDS)
    assert set(TERMINAL) <= groups[0]
    assert Scored not in TERMINAL
    assert Evaluated in TERMINAL


@events
def test_the_tag_is_the_last_token_of_the_subject(kind: type[Event]) -> None:
    """The kind in the message and the kind in the subject are the same word, and subjects.py has a row for it."""
    tag = str(kind.__struct_config__.tag)
    assert kind.__struct_config__.tag_field == "kind"
    assert tag == kind.__name__.lower()
    scopes = {
        AnyTrajectoryEvent: subjects.trajectory("r", "g0-0-0", tag),
        AnyLearnerEvent: subjects.learner("r", "main", tag),
        AnyRunEvent: subjects.run_event("r", tag),
    }
    subject = next(subject for union, subject in scopes.items() if kind in union.__args__)
    assert subject.rsplit(".", 1)[1] == tag
    rows = [row for row in subjects.TABLE if _matches(row.subject, subject)]
    assert len(rows) == 1
    assert OWNERS[kind] in rows[0].publishes


def _matches(pattern: str, subject: str) -> bool:
    pairs = list(zip(pattern.split("."), subject.split("."), strict=False))
    return len(pairs) == pattern.count(".") + 1 == subject.count(".") + 1 and all(
        want in ("*", got) for want, got in pairs
    )


def test_a_kind_says_its_name() -> None:
    """`event.kind` is what travels as `kind`."""
    result = Result(trajectory="g0-0-0", turn=0, call=0, text="")
    assert result.kind == msgpack.unpackb(encode(result))["kind"] == "result"


def test_work_leaves_out_what_is_default() -> None:
    """A wake-up without a state is small."""
    assert msgpack.unpackb(encode(Work(trajectory="g0-0-0", seq=5))) == {
        "trajectory": "g0-0-0",
        "seq": 5,
    }


def test_defaults_are_not_shared() -> None:
    """Two events made without calls do not have the same list."""
    first, second = (Turn(trajectory="g0-0-0", tokens=Tokens(), text="") for _ in range(2))
    first.calls.append(Call(tool="python", arguments={}))
    assert second.calls == []
