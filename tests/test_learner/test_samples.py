"""A scored trajectory as arrays."""

import pytest

from learner.samples import sample_of
from schemas.events import Admitted, Call, Result, Scored, Turn
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold_all

NAME = "g3-1-0"


def trajectory(*events) -> Trajectory:
    public = PublicPart(messages=[ChatMessage(role="user", content="?")])
    admitted = Admitted(trajectory=NAME, task="t", public=public, private_key="k")
    state = fold_all((event, seq) for seq, event in enumerate((admitted, *events)))
    assert state is not None
    return state


def turn(given: list[int], sampled: list[int], **fields) -> Turn:
    tokens = Tokens.given(given) + Tokens.sampled(
        sampled, [-0.5] * len(sampled), [2] * len(sampled)
    )
    return Turn(trajectory=NAME, tokens=tokens, text="", **fields)


CALL = Call(tool="python", arguments={})
FINISH = Call(tool="finish", arguments={"answer": "408"})


def test_a_trajectory_with_a_tool_call() -> None:
    """Tokens of all turns in order, each with its mask, log-probability and version; calls that ran are counted."""
    sample = sample_of(
        trajectory(
            turn([5, 6], [7, 8], calls=[CALL]),
            Result(trajectory=NAME, turn=0, call=0, text="408"),
            turn([9], [10], last=True),
            Scored(trajectory=NAME, reward=0.5),
        )
    )
    assert (sample.trajectory, sample.group, sample.reward) == (NAME, "g3", 0.5)
    assert sample.ids_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert sample.mask_T.tolist() == [False, False, True, True, False, True]
    assert sample.logprobs_T.tolist() == [0, 0, -0.5, -0.5, 0, -0.5]
    assert sample.versions_T.tolist() == [-1, -1, 2, 2, -1, 2]
    assert (sample.prompt_length, sample.sampled_count) == (2, 3)
    assert (sample.turns, sample.tool_calls, sample.truncated) == (2, 1, False)


@pytest.mark.parametrize(
    ("fields", "truncated"),
    [
        ({"finish_reason": "stop"}, False),
        ({"finish_reason": "length"}, True),
        ({"finish_reason": "length", "calls": [CALL]}, True),
        ({"finish_reason": "stop", "calls": [FINISH]}, False),
    ],
)
def test_truncated(fields, truncated: bool) -> None:
    """Ended at a limit of tokens, or of turns with a call that never ran; a call of `finish` is an answer."""
    state = trajectory(turn([5], [6], last=True, **fields), Scored(trajectory=NAME, reward=0.0))
    assert sample_of(state).truncated is truncated


def test_a_call_that_ends_the_trajectory_does_not_truncate_it() -> None:
    """As `submit` does: the last turn is none by itself, its result is."""
    state = trajectory(
        turn([5], [6], calls=[CALL]),
        Result(trajectory=NAME, turn=0, call=0, text="Submitted", last=True),
        Scored(trajectory=NAME, reward=1.0),
    )
    assert not sample_of(state).truncated


def test_a_turn_in_two_pieces_is_one_turn() -> None:
    """A piece that a drain cut off is not a turn of its own."""
    state = trajectory(
        turn([5], [6], finish_reason="partial"),
        turn([], [7], last=True),
        Scored(trajectory=NAME, reward=0.0),
    )
    assert sample_of(state).turns == 1


def test_refusals() -> None:
    """Without a reward there is nothing to learn; a first token that was sampled has nothing before it."""
    with pytest.raises(ValueError, match="no reward"):
        sample_of(trajectory(turn([5], [6], last=True)))
    with pytest.raises(ValueError, match="begins with a sampled token"):
        sample_of(trajectory(turn([], [6], last=True), Scored(trajectory=NAME, reward=1.0)))
