"""The watchdog by example: what it is shown, and what it says stands still."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from actors.fleet import Fleet, Heard
from actors.watchdog import (
    Changes,
    Sight,
    Waiting,
    Watchdog,
    known_stalls,
    why_hung,
    without_dispatcher,
)
from bus.work import Queue
from schemas.messages import Heartbeat, Held, Stall
from schemas.recipe import Deadlines, Policy, Recipe

DEADLINES = Deadlines(gen_s=20, tool_s=10, score_s=10, hang_s=30)
RECIPE = Recipe(policy=Policy(model="m"), deadlines=DEADLINES)
EVERYONE = ("dispatcher", "generator", "toolbox", "scorer", "learner")


def beat(role: str, *held: tuple[str, str, float], **more: object) -> Heartbeat:
    return Heartbeat(
        run="r",
        role=role,  # type: ignore[arg-type]
        replica=f"{role}-h-1",
        host="h",
        pid=1,
        up_s=100.0,
        held=[Held(trajectory=name, stage=stage, for_s=for_s) for name, stage, for_s in held],
        held_count=len(held),
        **more,  # type: ignore[arg-type]
    )


def alive(*roles: str) -> list[Heard]:
    return [Heard(beat(role), 0.5) for role in roles]


def at(stage: str, since_s: float = 0.0, queue: str = "") -> Waiting:
    return Waiting(stage, queue or stage, since_s)


def kinds(changes: Changes) -> list[str]:
    return [stall.kind for stall in changes.stalls]


def look_at(heard: Sequence[Heard], live: dict[str, Waiting], **more: object) -> Changes:
    """The first look, at second 100."""
    return Watchdog(RECIPE).look(Sight(100.0, live, heard, **more))  # type: ignore[arg-type]


# -- what stands still -----------------------------------------------------------------------------


def test_all_is_well() -> None:
    """Trajectories in every stage, with somebody for each, and nothing late."""
    live = {"g0-0-0": at("gen", 90), "g0-1-0": at("tool", 95), "g1-0-0": at("scored", 0)}
    assert look_at(alive(*EVERYONE), live).stalls == []


@pytest.mark.parametrize(
    ("stage", "role"),
    [("gen", "generator"), ("tool", "toolbox"), ("score", "scorer"), ("scored", "learner")],
)
def test_a_stage_without_a_replica_is_said_within_five_seconds(stage: str, role: str) -> None:
    """With who waits and what to do; it is over when one appears, and both are told once."""
    watchdog = Watchdog(RECIPE)
    others = alive(*(each for each in EVERYONE if each != role))
    live = {"g0-0-0": at(stage, 9.5), "g0-1-0": at(stage, 9.8)}
    told: list[tuple[float, Stall]] = []
    over: list[Stall] = []
    for now in range(10, 20):
        changes = watchdog.look(Sight(float(now), live, others))
        told += [(now, stall) for stall in changes.begun]
        over += changes.ended
    ((when, stall),) = told
    assert over == []
    assert when < 15
    assert (stall.kind, stall.subject) == ("no_replica", role)
    assert f"no {role} is there; g0-0-0 and 1 more wait" in str(stall)
    live = {name: at(stage, 15.0) for name in live}
    changes = watchdog.look(Sight(20.0, live, alive(*EVERYONE)))
    assert changes.stalls == []
    assert [round(stall.for_s) for stall in changes.ended] == [9]
    assert watchdog.look(Sight(21.0, live, alive(*EVERYONE))).ended == []


def test_a_role_that_nobody_waits_for_may_be_away() -> None:
    """No trajectory has come to the toolbox yet."""
    watchdog = Watchdog(RECIPE)
    for now in (10.0, 30.0):
        changes = watchdog.look(Sight(now, {"g0-0-0": at("gen", now)}, alive("generator")))
        assert changes.stalls == []


def test_without_version_0_the_learner_is_waited_for() -> None:
    """Nothing is admitted before: then no trajectory shows that it is away."""
    watchdog = Watchdog(RECIPE)
    for now in (10.0, 13.0):
        changes = watchdog.look(Sight(now, {}, alive("generator"), policy_version=-1))
    assert "no learner is there to make version 0" in str(changes.stalls[0])
    cold = [Heard(beat("learner", phase="cold start 10/400"), 0.5)]
    assert watchdog.look(Sight(14.0, {}, cold, policy_version=-1)).stalls == []


def test_a_silent_replica_is_named_with_what_it_had() -> None:
    """Until that has moved, or another has taken it; a silent replica that had nothing is nobody's trouble."""
    gone = Heard(beat("generator", ("g0-0-0", "gen", 1.0)), 6.0)
    rest = alive("toolbox", "scorer", "learner")
    other = beat("generator")
    live = {"g0-0-0": at("gen", 90)}
    (stall,) = look_at([gone, Heard(other, 0.0), *rest], live).stalls
    assert str(stall) == "generator-h-1 gives no sign of life and had g0-0-0, for 6 s"
    assert look_at([gone, Heard(other, 0.0), *rest], {"g0-0-0": at("gen", 97)}).stalls == []
    assert look_at([gone, Heard(other, 0.0), *rest], {}).stalls == []
    taken = Heard(beat("generator", ("g0-0-0", "gen", 1.0)), 0.0)
    assert look_at([gone, taken, *rest], live).stalls == []


def test_of_several_silent_replicas_the_last_that_had_it_is_named() -> None:
    """A hop that kills its holders leaves a row of them."""

    def gone(number: int, silent_s: float) -> Heard:
        dead = beat("scorer", ("g0-0-0", "score", 1.0))
        return Heard(replace(dead, replica=f"scorer-h-{number}"), silent_s)

    live = {"g0-0-0": at("score", 0.0)}
    heard = [gone(1, 30.0), gone(3, 6.0), gone(2, 18.0), Heard(beat("scorer"), 0.0)]
    stalls = Watchdog(replace(RECIPE, deadlines=Deadlines())).look(Sight(40.0, live, heard)).stalls
    assert [stall.subject for stall in stalls] == ["scorer-h-3"]


def test_a_blocked_event_loop_is_seen_by_its_heartbeat_thread() -> None:
    """Loading a model is known to block."""
    blocked = beat("generator", ("g0-0-0", "gen", 9.0), loop_lag_s=8.0)
    (stall,) = look_at([Heard(blocked, 0.5)], {"g0-0-0": at("gen", 90)}).stalls
    assert stall.kind == "blocked"
    assert str(stall) == "generator-h-1's event loop does not run; it has g0-0-0 (gen), for 8 s"
    loading = beat("generator", loop_lag_s=8.0, phase="loading the model")
    assert look_at([Heard(loading, 0.5)], {}).stalls == []


def test_a_trajectory_held_past_its_deadline_is_named() -> None:
    """With its stage, its holder and for how long; each stage has its own."""
    heard = [
        Heard(beat("generator", ("g0-0-0", "gen", 15.0)), 0.5),
        Heard(beat("toolbox", ("g0-1-0", "tool", 15.0)), 0.5),
    ]
    live = {"g0-0-0": at("gen", 80), "g0-1-0": at("tool", 80)}
    assert [str(stall) for stall in look_at(heard, live).stalls] == [
        "g0-1-0 (tool) is held by toolbox-h-1, for 15 s"
    ]


def test_a_trajectory_that_nobody_has_is_named() -> None:
    """Past its deadline, and not because it waits in its queue."""
    live = {"g0-0-0": at("tool", 80, "tool.python")}
    (stall,) = look_at(alive(*EVERYONE), live).stalls
    assert str(stall) == "g0-0-0 (tool) has no event and nobody holds it, for 20 s"
    assert look_at(alive(*EVERYONE), live, queues={"tool.python": Queue(4, 9)}).stalls == []


def test_a_queue_that_does_not_move_is_named() -> None:
    """Full or not: what counts is whether anybody takes of it."""
    watchdog = Watchdog(RECIPE)

    def look(now_s: float, queue: Queue) -> Changes:
        return watchdog.look(Sight(now_s, {}, alive(*EVERYONE), {"tool.python": queue}))

    assert look(0.0, Queue(waiting=3, taken=5)).stalls == []
    assert look(9.0, Queue(waiting=4, taken=6)).stalls == []
    assert look(18.0, Queue(waiting=5, taken=6)).stalls == []
    (stall,) = look(20.0, Queue(waiting=7, taken=6)).stalls
    assert str(stall) == "7 messages wait in tool.python and none is taken, for 11 s"
    assert [each.kind for each in look(21.0, Queue(waiting=6, taken=7)).ended] == ["queue"]
    assert look(80.0, Queue(waiting=0, taken=7)).stalls == []
    assert look(81.0, Queue(waiting=1, taken=7)).stalls == [], "it was empty a second ago"


def test_a_learner_that_waits_for_groups_says_for_whom() -> None:
    """The groups nearest to completion, their missing members, and where those are."""
    watchdog = Watchdog(RECIPE)
    learner = Heard(beat("learner", phase="waiting for groups", policy_version=4), 0.5)
    tool = Heard(beat("toolbox", ("g1-1-0", "tool", 1.0)), 0.5)
    heard = [learner, tool, *alive("generator", "scorer")]

    def look(now_s: float) -> Changes:
        live = {
            "g0-0-0": at("gen", now_s),
            "g0-1-0": at("gen", now_s),
            "g1-0-0": at("scored", 0),
            "g1-1-0": at("tool", now_s),
            "e4x0-0-0": Waiting("gen", "gen", now_s, trained=False),
        }
        return watchdog.look(Sight(now_s, live, heard))

    assert look(0.0).stalls == []
    assert look(19.0).stalls == [], "sampling takes its time: a stage's deadline"
    (stall,) = look(20.0).stalls
    assert str(stall) == (
        "learner-h-1 is waiting for groups at version 4: group g1 misses g1-1-0 (tool, held by toolbox-h-1); "
        "group g0 misses g0-0-0 (gen), g0-1-0 (gen), for 20 s"
    )
    heard[0] = Heard(beat("learner", phase="waiting for groups", policy_version=5), 0.5)
    assert look(21.0).stalls == [], "it has made a step"


def test_a_learner_that_waits_for_stragglers_says_so_soon() -> None:
    """It trains without them in the end."""
    watchdog = Watchdog(RECIPE)
    heard = [Heard(beat("learner", phase="waiting for stragglers"), 0.5), *alive("generator")]
    for now in (0.0, 6.0):
        changes = watchdog.look(Sight(now, {"g0-0-0": at("gen", now)}, heard))
    assert "waiting for stragglers at version -1: group g0 misses g0-0-0 (gen)" in str(
        changes.stalls[0]
    )


def test_the_longest_comes_first() -> None:
    heard = [Heard(beat("toolbox", ("g0-0-0", "tool", 15.0), ("g0-1-0", "tool", 25.0)), 0.5)]
    live = {"g0-0-0": at("tool", 60), "g0-1-0": at("tool", 60)}
    assert [stall.subject for stall in look_at(heard, live).stalls] == ["g0-1-0", "g0-0-0"]


# -- a supervisor and its children -----------------------------------------------------------------

HOUR_S = 3600.0


def test_a_silent_child_is_hung() -> None:
    """After `hang_s`, but only of silence that is its own."""
    heard = Heard(beat("generator"), 31.0)
    assert why_hung(heard, HOUR_S, HOUR_S, DEADLINES) == "no sign of life for 31 s"
    assert why_hung(heard, HOUR_S, 20.0, DEADLINES) == "", "the server was away until 20 s ago"
    assert why_hung(heard, HOUR_S, 0.0, DEADLINES) == "", "it still is"
    assert why_hung(Heard(beat("generator"), 29.0), HOUR_S, HOUR_S, DEADLINES) == ""


def test_a_child_that_loads_may_block_for_longer() -> None:
    """Neither importing torch nor a large model is a hang."""
    loading = beat("generator", phase="loading the model", loop_lag_s=60.0)
    assert why_hung(Heard(loading, 0.5), 60.0, HOUR_S, DEADLINES) == ""
    assert why_hung(Heard(loading, 60.0), 60.0, HOUR_S, DEADLINES) == ""
    assert why_hung(None, 60.0, HOUR_S, DEADLINES) == ""
    assert why_hung(None, 121.0, HOUR_S, DEADLINES) == "no sign of life for 121 s"


def test_a_blocked_loop_is_hung() -> None:
    blocked = beat("scorer", loop_lag_s=31.0)
    assert why_hung(Heard(blocked, 0.5), HOUR_S, HOUR_S, DEADLINES) == (
        "its event loop has not run for 31 s"
    )
    assert why_hung(Heard(beat("scorer", loop_lag_s=29.0), 0.5), HOUR_S, HOUR_S, DEADLINES) == ""


def test_a_child_that_holds_a_hop_for_two_deadlines_is_hung() -> None:
    """An outage of the server in the middle of it does not count."""
    stuck = Heard(beat("generator", ("g0-0-0", "gen", 41.0)), 0.5)
    assert why_hung(stuck, HOUR_S, HOUR_S, DEADLINES) == "g0-0-0 (gen) has been held for 41 s"
    assert why_hung(stuck, HOUR_S, 30.0, DEADLINES) == ""
    slow = Heard(beat("generator", ("g0-0-0", "gen", 39.0)), 0.5)
    assert why_hung(slow, HOUR_S, HOUR_S, DEADLINES) == ""


def test_heartbeats_flow_while_none_is_missed() -> None:
    """A gap of the server's, or of ours, begins the count anew; one replica's silence does not."""
    fleet = Fleet()
    begun = fleet._last_s
    for second in range(11):
        fleet.take(beat("generator"), begun + second)
    assert fleet.flows_s(begun + 11) == pytest.approx(11.0)
    assert fleet.flows_s(begun + 15) == 0.0
    fleet.take(beat("supervisor"), begun + 40)
    fleet.take(beat("supervisor"), begun + 41)
    assert fleet.flows_s(begun + 42) == pytest.approx(2.0)
    last = fleet.last("generator-h-1", begun + 42)
    assert last is not None
    assert last.silent_s == pytest.approx(32.0)


# -- for people ------------------------------------------------------------------------------------


def test_a_missing_dispatcher_shows_in_the_beats() -> None:
    """Nobody, only standbys, or one that acts."""
    standby = beat("dispatcher", phase="standby")
    assert without_dispatcher([beat("generator")]).startswith("no dispatcher is there")
    assert without_dispatcher([standby, standby]) == (
        "no dispatcher holds the lease: 2 wait for it"
    )
    assert without_dispatcher([standby, beat("dispatcher", phase="paused")]) == ""


def test_a_stall_that_two_have_seen_is_told_once() -> None:
    """The longer one, and the longest first."""

    def stall(subject: str, for_s: float) -> Stall:
        return Stall(kind="silent", subject=subject, detail=subject, for_s=for_s)

    told = known_stalls(
        [
            beat("dispatcher", stalls=[stall("a", 5.0), stall("b", 7.0)]),
            beat("supervisor", stalls=[stall("a", 9.0)]),
        ]
    )
    assert [(each.subject, each.for_s) for each in told.values()] == [("a", 9.0), ("b", 7.0)]
