"""Requests of VerlTool's client: what is read, what is refused with what, and that nothing else can happen."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.gateway_requests import Action, Answer, BadRequest, read_request, reply_to

FINITE = st.floats(allow_nan=False, allow_infinity=False)
"""JSON has no others."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
SMALL = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8)
ACTIONS = st.lists(
    st.builds(
        Action,
        trajectory=st.text(max_size=12),
        text=st.text(max_size=30),
        extra=st.dictionaries(st.sampled_from(["stdin", "db_id", "x"]), SMALL, max_size=3),
        finish=st.booleans(),
        last=st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


some = settings(max_examples=30)


def body_of(actions: list[Action]) -> dict[str, Any]:
    return {
        "trajectory_ids": [each.trajectory for each in actions],
        "actions": [each.text for each in actions],
        "extra_fields": [each.extra for each in actions],
        "finish": [each.finish for each in actions],
        "is_last_step": [each.last for each in actions],
    }


@given(ACTIONS, st.dictionaries(st.text(max_size=8).map("_".__add__), JSON, max_size=2))
@some
def test_a_request_is_its_actions_in_order(actions: list[Action], unknown: dict[str, Any]) -> None:
    """Keys that are not known are ignored, as VerlTool ignores them."""
    assert read_request(json.dumps(body_of(actions) | unknown).encode()) == actions


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@some
def test_no_body_does_anything_else(body: bytes) -> None:
    """It is read, or refused with a detail in the shape of FastAPI's."""
    try:
        assert read_request(body)
    except BadRequest as error:
        for each in error.detail:
            assert set(each) == {"type", "loc", "msg"}
            assert each["loc"][0] == "body"


@given(
    st.fixed_dictionaries(
        {"trajectory_ids": JSON, "actions": JSON},
        optional={"extra_fields": JSON, "finish": JSON, "is_last_step": JSON},
    )
)
@some
def test_no_field_does_anything_else(body: dict[str, Any]) -> None:
    """The same where the keys are right."""
    try:
        actions = read_request(json.dumps(body).encode())
    except BadRequest:
        return
    assert [each.text for each in actions] == body["actions"]
    msgspec.msgpack.encode([each.extra for each in actions])


def test_optional_fields_may_be_missing_or_null() -> None:
    """As bench/tools.py and the oldest clients leave them out."""
    body = {"trajectory_ids": ["a", "b"], "actions": ["1", "2"], "finish": None}
    assert read_request(json.dumps(body).encode()) == [Action("a", "1"), Action("b", "2")]


def test_flags_may_stand_in_the_extra_fields() -> None:
    """VerlTool puts them there before it looks; numbers are flags too."""
    body = {
        "trajectory_ids": ["a", "b"],
        "actions": ["", ""],
        "extra_fields": [{"finish": True}, {"is_last_step": True}],
        "finish": [0, 1],
    }
    first, second = read_request(json.dumps(body).encode())
    assert (first.finish, first.last) == (True, False)
    assert (second.finish, second.last) == (True, True)


def test_a_bare_id_is_one_trajectory() -> None:
    """One of VerlTool's versions finishes its trajectories so, and is answered 422 by its own server."""
    body = {
        "trajectory_ids": "abc",
        "actions": [""],
        "finish": [True],
        "is_last_step": [True],
    }
    (action,) = read_request(json.dumps(body).encode())
    assert action == Action("abc", "", {}, finish=True, last=True)


@pytest.mark.parametrize(
    ("body", "where", "what"),
    [
        ({"trajectory_ids": ["a"], "actions": ["1", "2"]}, ["actions"], "must match"),
        ({"trajectory_ids": [], "actions": []}, ["actions"], "length >= 1"),
        ({"trajectory_ids": ["a"]}, [], "missing required field `actions`"),
        ({"trajectory_ids": ["a"], "actions": ["1"], "extra_fields": {}}, ["extra_fields"], ""),
        ({"trajectory_ids": ["a", 7], "actions": ["1", "2"]}, ["trajectory_ids", 1], "`str`"),
        ({"trajectory_ids": ["a"], "actions": [None]}, ["actions", 0], "`str`"),
        ({"trajectory_ids": ["a"], "actions": ["1"], "finish": []}, ["finish"], "must match"),
        ({"trajectory_ids": ["a"], "actions": ["1"], "finish": ["x"]}, ["finish", 0], "`bool`"),
        (
            {"trajectory_ids": ["a"], "actions": ["1"], "extra_fields": [{"n": 2**70}]},
            ["extra_fields", 0],
            "64 bits",
        ),
        ([], [], "`object`"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(body: Any, where: list[Any], what: str) -> None:
    """The cases that VerlTool's server answers with 422, and a few that it does not look at."""
    with pytest.raises(BadRequest) as caught:
        read_request(json.dumps(body).encode())
    (detail,) = caught.value.detail
    assert detail["loc"] == ["body", *where]
    assert what in detail["msg"]


def test_what_is_not_json_is_said() -> None:
    with pytest.raises(BadRequest, match="not JSON"):
        read_request(b"{")


def test_a_reply_has_verltool_s_fields() -> None:
    """And no more; numbers and booleans are JSON's own."""
    answers = [Answer("a", done=False, valid=True), Answer({"obs": "b"}, done=True, valid=False)]
    assert json.loads(reply_to(answers, 2.5, 0.5)) == {
        "observations": ["a", {"obs": "b"}],
        "dones": [False, True],
        "valids": [True, False],
        "processing_time_ms": 2.5,
        "queue_time_ms": 0.5,
    }
