"""The bytes of one event of each kind, as processes of every version must send and read them.

A new kind's bytes are added to golden.json by

    python tests/test_schemas/test_golden.py

which never changes what is there. Bytes that no longer match mean that a log written before cannot be trusted to be
read as it was meant: mend the schema, or, before the first log that matters, delete the entry by hand.
"""

import json
from pathlib import Path

import pytest

from bus.codec import decode, encode
from schemas.events import (
    Admitted,
    AnyEvent,
    Archived,
    Call,
    Cause,
    Dropped,
    Ended,
    Evaluated,
    Event,
    Expired,
    Failed,
    Filtered,
    Finished,
    Joined,
    Opened,
    Paused,
    Result,
    Resumed,
    Scored,
    ShownFunction,
    Started,
    Step,
    Stepped,
    Stopping,
    ToolAdded,
    ToolRemoved,
    Turn,
    Warmed,
)
from schemas.recipe import Data, Policy, Recipe, Tools
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens

FILE = Path(__file__).with_name("golden.json")

EXAMPLES: list[Event] = [
    Admitted(
        replica="dispatcher-host-1",
        trajectory="g12-3-0",
        task="47x86",
        public=PublicPart(
            messages=[ChatMessage(role="user", content="What is 47 * 86?")],
            tools=["python"],
            extra={"unit": "apples"},
        ),
        private_key="g12",
        min_policy_version=7,
        temperature=0.5,
        seed=2**62,
    ),
    Turn(
        replica="generator-host-2",
        trajectory="g12-3-0",
        tokens=Tokens.given([1, 2, 70_000]) + Tokens.sampled([3, 4], [-0.25, -1.5], [7, 8]),
        text="<python>47*86</python>",
        calls=[Call(tool="python", arguments={"code": "47*86"})],
        feedback="",
    ),
    Started(replica="toolbox-host-3", trajectory="g12-3-0", turn=0, call=0),
    Result(
        replica="toolbox-host-3",
        trajectory="g12-3-0",
        turn=0,
        call=0,
        text="4042",
        duration_ms=12.5,
        tier="ns",
        handed_in=b"diff --git",
        last=True,
    ),
    Scored(replica="scorer-host-4", trajectory="g12-3-0", reward=1.0, parts={"answered": 1.0}),
    Evaluated(replica="scorer-host-4", trajectory="e8x0-0-0", reward=0.5),
    Expired(replica="dispatcher-host-1", trajectory="g12-2-0", reason="too stale"),
    Failed(
        replica="dispatcher-host-1",
        trajectory="g12-1-0",
        cause=Cause(boundary="deadline", code="gen", detail="no event for 120 s, 3 times"),
    ),
    Dropped(
        replica="dispatcher-host-1", trajectory="g12-0-1", reason="a member of its group failed"
    ),
    Finished(replica="gateway-host-6", trajectory="x_4be0c2-0-0", reason="told to finish"),
    Warmed(replica="learner-host-5", step=20, steps=200, metrics={"step": 20.0, "loss": 2.5}),
    Joined(replica="shadow-host-6", overrides=["learner.learning_rate=1e-4"]),
    Filtered(
        replica="learner-host-5",
        group="g12",
        reason="zero_variance",
        trajectories=["g12-0-0", "g12-1-0"],
    ),
    Step(
        replica="learner-host-5",
        step=9,
        start_version=8,
        trajectories=["g13-0-0", "g13-1-0"],
        filtered=["g12"],
        seed=3,
        threads=2,
    ),
    Stepped(
        replica="learner-host-5",
        step=9,
        policy_version=9,
        weights_sha256="ab" * 32,
        metrics={
            "step": 9,
            "reward_mean": 0.5,
            "loss": -0.125,
            "failed_by_cause": {"deadline.gen": 1},
        },
        batch_sha256="cd" * 32,
    ),
    Opened(
        replica="supervisor",
        recipe=Recipe(
            policy=Policy(model="recipes.arithmetic:model"),
            data=Data(rows="recipes.arithmetic:rows"),
            tools=Tools(use=["python"]),
        ),
        recipe_dir="recipes",
    ),
    Paused(replica="operator"),
    Resumed(replica="operator"),
    ToolAdded(
        replica="operator",
        tool="shout",
        version="0a1b2c3d",
        functions=[
            ShownFunction(
                name="shout",
                description="Say it louder.",
                parameters={"type": "object", "properties": {"text": {"type": "string"}}},
            )
        ],
        use="shout",
        source="async def shout(context, text: str) -> str: ...",
        options={"timeout_s": 2.5},
    ),
    ToolRemoved(replica="operator", tool="shout"),
    Stopping(replica="operator", reason="`actors stop`"),
    Ended(replica="dispatcher-host-1", reason="all steps done"),
    Archived(replica="operator", messages=12345, sha256="cd" * 32, log_seq=99_999),
]
BY_KIND = {event.kind: event for event in EXAMPLES}


def test_every_kind_has_an_example() -> None:
    """Nothing can be added to the vocabulary without its bytes on record."""
    kinds = {str(kind.__struct_config__.tag) for kind in AnyEvent.__args__}
    assert set(BY_KIND) == kinds
    assert set(json.loads(FILE.read_text())) == kinds


@pytest.mark.parametrize("kind", BY_KIND)
def test_the_bytes_on_record_are_the_event(kind: str) -> None:
    """Bytes written by an earlier version are read as the same event by this one."""
    recorded = bytes.fromhex(json.loads(FILE.read_text())[kind])
    assert decode(recorded, AnyEvent) == BY_KIND[kind]


@pytest.mark.parametrize("kind", [kind for kind in BY_KIND if kind != "opened"])
def test_the_event_is_the_bytes_on_record(kind: str) -> None:
    """What this version sends is, to the byte, what earlier ones sent; a recipe alone may gain keys."""
    assert encode(BY_KIND[kind]).hex() == json.loads(FILE.read_text())[kind]


def add_missing() -> None:
    """Record the kinds that have no bytes yet."""
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    for kind, event in BY_KIND.items():
        if kind not in recorded:
            recorded[kind] = encode(event).hex()
            print(f"added {kind}")
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    add_missing()
