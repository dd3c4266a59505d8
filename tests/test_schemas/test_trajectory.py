"""`fold`, and where a trajectory goes next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import (
    TERMINAL,
    Admitted,
    AnyTrajectoryEvent,
    Call,
    Cause,
    Dropped,
    Evaluated,
    Expired,
    Failed,
    Result,
    Scored,
    Started,
    Turn,
)
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Hop, Trajectory, TrajectoryId, fold, fold_all

ADMITTED = Admitted(trajectory="g0-0-0", task="t", public=PublicPart(messages=[]), private_key="g0")
PYTHON = Call(tool="python", arguments={"code": "1"})
SEARCH = Call(tool="search", arguments={"query": "1"})
CAUSE = Cause(boundary="engine", code="gone")


def turn(*calls: Call, text: str = "", reason: str = "stop", last: bool = False) -> Turn:
    return Turn(
        trajectory="g0-0-0",
        tokens=Tokens.given([1]) + Tokens.sampled([2], [-0.5], [0]),
        text=text,
        calls=list(calls),
        finish_reason=reason,
        last=last,
    )


def result(turn_index: int, call: int) -> Result:
    return Result(trajectory="g0-0-0", turn=turn_index, call=call, text="1")


SCORED = Scored(trajectory="g0-0-0", reward=0.5)
ENDS = [
    Evaluated(trajectory="g0-0-0", reward=0.25),
    Expired(trajectory="g0-0-0", reason=""),
    Failed(trajectory="g0-0-0", cause=CAUSE),
    Dropped(trajectory="g0-0-0", reason=""),
]
MIDDLE = st.from_type(Turn | Result | Started)


def folded(*events: AnyTrajectoryEvent) -> Trajectory:
    state = fold_all((event, seq) for seq, event in enumerate(events, 1))
    assert state is not None
    return state


# -- fold ------------------------------------------------------------------------------------------


@given(st.lists(MIDDLE, max_size=8), st.none() | st.from_type(Scored), st.data())
def test_fold_is_concatenation(
    middle: list[Turn | Result | Started], scored: Scored | None, data: st.DataObject
) -> None:
    """Whatever order turns and results come in, the tokens are those of the turns, in that order."""
    end = data.draw(st.none() | st.sampled_from(ENDS))
    events = [ADMITTED, *middle, *([scored] if scored else []), *([end] if end else [])]
    seqs = data.draw(
        st.lists(st.integers(1, 10**6), min_size=len(events), max_size=len(events), unique=True)
    )
    state = fold_all(zip(events, sorted(seqs), strict=True))
    assert state is not None
    turns = [event for event in middle if isinstance(event, Turn)]
    assert state.tokens == sum((turn.tokens for turn in turns), Tokens())
    assert state.turns == turns
    assert state.results == [event for event in middle if isinstance(event, Result)]
    assert state.started == next((e for e in reversed(middle) if isinstance(e, Started)), None)
    assert (state.scored, state.end, state.seq) == (scored, end, max(seqs))


@given(st.lists(MIDDLE, max_size=6), st.integers(0, 6))
def test_a_state_goes_on_where_another_stopped(
    middle: list[Turn | Result | Started], cut: int
) -> None:
    """The state in a work message, and what was appended since, is the state from the beginning."""
    events = [ADMITTED, *middle]
    first = folded(*events[: cut + 1])
    for seq, event in enumerate(events[cut + 1 :], cut + 2):
        first = fold(first, event, seq)
    assert first == folded(*events)


def test_nothing_was_folded_from_nothing() -> None:
    """A trajectory that was never admitted has no state."""
    assert fold_all([]) is None


@pytest.mark.parametrize("event", [turn(), result(0, 0), SCORED, *ENDS], ids=lambda e: e.kind)
def test_nothing_comes_before_the_admission(event: AnyTrajectoryEvent) -> None:
    with pytest.raises(ValueError, match=f"g0-0-0 has {event.kind} before admitted"):
        fold(None, event, 1)


def test_a_second_admission_is_refused() -> None:
    with pytest.raises(ValueError, match="g0-0-0 is admitted twice"):
        folded(ADMITTED, ADMITTED)


@pytest.mark.parametrize("end", ENDS, ids=lambda e: e.kind)
@pytest.mark.parametrize("event", [turn(), result(0, 0), SCORED, *ENDS], ids=lambda e: e.kind)
def test_nothing_comes_after_the_end(end: AnyTrajectoryEvent, event: AnyTrajectoryEvent) -> None:
    """A trajectory ends once, and whoever writes later changes nothing."""
    assert isinstance(end, TERMINAL)
    with pytest.raises(ValueError, match=f"g0-0-0 has {event.kind} after {end.kind}"):
        folded(ADMITTED, end, event)


@pytest.mark.parametrize("event", [turn(), result(0, 0), SCORED], ids=lambda e: e.kind)
def test_after_the_score_only_the_end_comes(event: AnyTrajectoryEvent) -> None:
    """A reward is given once, for a trajectory that is finished."""
    with pytest.raises(ValueError, match=f"g0-0-0 has {event.kind} after scored"):
        folded(ADMITTED, turn(last=True), SCORED, event)


@pytest.mark.parametrize("end", ENDS[1:], ids=lambda e: e.kind)
def test_a_scored_trajectory_may_be_closed(end: AnyTrajectoryEvent) -> None:
    """With its group, by the dispatcher."""
    assert folded(ADMITTED, turn(last=True), SCORED, end).end == end


# -- where it goes next ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "hop"),
    [
        ([], Hop("gen")),
        ([turn(reason="partial")], Hop("gen")),
        ([turn(PYTHON)], Hop("tool", "python")),
        ([turn(SEARCH, PYTHON)], Hop("tool", "search")),
        ([turn(SEARCH, PYTHON), result(0, 0)], Hop("tool", "python")),
        ([turn(SEARCH, PYTHON), result(0, 0), result(0, 1)], Hop("gen")),
        ([turn(PYTHON), Started(trajectory="g0-0-0", turn=0, call=0)], Hop("tool", "python")),
        ([turn(PYTHON), result(0, 0), turn(PYTHON)], Hop("tool", "python")),
        ([turn(PYTHON), result(0, 0), turn(reason="partial")], Hop("gen")),
        ([turn()], Hop("gen")),
        ([turn(last=True)], Hop("score")),
        ([turn(PYTHON, last=True)], Hop("score")),
        ([turn(reason="length", last=True)], Hop("score")),
        ([turn(last=True), SCORED], None),
        *(([end], None) for end in ENDS),
        *(([turn(PYTHON), end], None) for end in ENDS),
        *(([turn(last=True), SCORED, end], None) for end in ENDS[1:]),
    ],
    ids=lambda value: "+".join(e.kind for e in value) if isinstance(value, list) else "",
)
def test_the_next_hop(events: list[AnyTrajectoryEvent], hop: Hop | None) -> None:
    """Generator, then each call in its order, then the generator again; the last turn goes to be scored."""
    assert folded(ADMITTED, *events).next_hop == hop


def test_the_next_call_is_told_with_its_index() -> None:
    """Of the last turn only: results of earlier turns do not count."""
    state = folded(ADMITTED, turn(PYTHON), result(0, 0), turn(SEARCH, PYTHON), result(1, 0))
    assert state.next_call == (1, PYTHON)
    assert folded(ADMITTED).next_call is None
    assert folded(ADMITTED, turn()).next_call is None


def test_a_turn_cut_into_pieces_is_one_turn() -> None:
    """Its text is what all pieces say together."""
    pieces = [turn(text="<py", reason="partial"), turn(text="thon>", reason="partial")]
    before = [turn(PYTHON, text="first"), result(0, 0)]
    open_ = folded(ADMITTED, *before, *pieces)
    assert open_.open_pieces() == pieces
    assert open_.turn_text == "<python>"
    assert open_.turn_count == 1
    done = folded(ADMITTED, *before, *pieces, turn(text="1"))
    assert done.open_pieces() == []
    assert done.turn_text == "<python>1"
    assert done.turn_count == 2
    assert folded(ADMITTED).turn_text == ""


def test_the_reward_is_the_scorer_s() -> None:
    """From either kind of score; a trajectory without one has none, never 0."""
    assert folded(ADMITTED, SCORED).reward == 0.5
    assert folded(ADMITTED, ENDS[0]).reward == 0.25
    assert folded(ADMITTED).reward is None
    assert folded(ADMITTED, ENDS[2]).reward is None


# -- ids -------------------------------------------------------------------------------------------

GROUP = st.from_regex(r"[A-Za-z0-9_]+", fullmatch=True)


@given(GROUP, st.integers(0, 999), st.integers(0, 9))
def test_an_id_reads_back(group: str, member: int, attempt: int) -> None:
    """Group, member and attempt, in one token of a subject."""
    name = TrajectoryId(group, member, attempt)
    assert TrajectoryId.parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", "--", "g0", "g0-1", "g0-1-", "-1-0", "g0--0", "g0-x-0", "g0-1-0-2", "g0-1--2"),
        *("g0-+1-0", "g0- 1-0", "g0-1.0-0", "g0-²-0", "g0-1-0\n", "g0-٣-0", "g0-01-0"),
        *("*-0-0", "g.0-1-0", "g 0-1-0", "g0-1-00", "g0-" + "9" * 5000 + "-0"),
    ],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a trajectory id"):
        TrajectoryId.parse(text)


@given(st.text(st.sampled_from("g0\u0661-\n ."), max_size=12))
def test_any_text_is_an_id_or_refused(text: str) -> None:
    """What is taken for an id is written back as it was: no trajectory has two names."""
    try:
        name = TrajectoryId.parse(text)
    except ValueError:
        return
    assert str(name) == text
