"""A trajectory's place is what its folded state says, at every event."""

from hypothesis import given
from hypothesis import strategies as st

from actors.place import Place
from schemas.events import Admitted, AnyTrajectoryEvent, Call, Result, Scored, Started, Turn
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold

NAME = "g0-0-0"
ADMITTED = Admitted(trajectory=NAME, task="t", public=PublicPart(messages=[]), private_key="")
TOOLS = st.lists(st.sampled_from(["python", "search"]), max_size=3)


def turn(tools: list[str], *, last: bool) -> Turn:
    calls = [Call(tool=tool, arguments={}) for tool in tools]
    return Turn(trajectory=NAME, tokens=Tokens(), text="", calls=calls, last=last)


def next_event(state: Trajectory, data: st.DataObject) -> AnyTrajectoryEvent:
    """Whatever the stage that is next may append."""
    hop = state.next_hop
    assert hop is not None
    if hop.stage == "gen":
        return turn(data.draw(TOOLS), last=data.draw(st.booleans()))
    if hop.stage == "score":
        return Scored(trajectory=NAME, reward=0.0)
    assert state.next_call is not None
    call, number = state.next_call[0], len(state.turns) - 1
    if state.started is None and data.draw(st.booleans()):
        return Started(trajectory=NAME, turn=number, call=call)
    last = data.draw(st.booleans())
    return Result(trajectory=NAME, turn=number, call=call, text="", last=last)


@given(st.data(), st.integers(0, 12))
def test_a_place_is_the_next_hop(data: st.DataObject, count: int) -> None:
    """Its stage and the queue of its work message, whatever has happened."""
    state = fold(None, ADMITTED, 1)
    place = Place().after(ADMITTED)
    for seq in range(2, 2 + count):
        hop = state.next_hop
        if hop is None:
            assert place.stage == "scored"
            return
        assert place.stage == hop.stage
        assert place.queue == (f"tool.{hop.tool}" if hop.tool else hop.stage)
        event = next_event(state, data)
        state, place = fold(state, event, seq), place.after(event)
