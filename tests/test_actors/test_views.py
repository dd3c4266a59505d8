"""What people and programs are shown of the log, from the bytes on record of every kind of event."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from actors.progress import Progress, step_line
from actors.report import Report, evaluated_version
from actors.views import alive_table, event_json, event_line, stall_lines, trajectory_text
from bus.codec import decode
from bus.log import Stored
from schemas.events import (
    Admitted,
    AnyEvent,
    Call,
    Cause,
    Ended,
    Evaluated,
    Failed,
    Filtered,
    Paused,
    Result,
    Resumed,
    Scored,
    Step,
    Stepped,
    Turn,
    Warmed,
)
from schemas.messages import Heartbeat, Held, Stall
from schemas.recipe import Learner, Policy, Recipe
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import fold_all

GOLDEN = json.loads((Path(__file__).parents[1] / "test_schemas" / "golden.json").read_text())
RECORDED: dict[str, AnyEvent] = {
    kind: decode(bytes.fromhex(data), AnyEvent) for kind, data in GOLDEN.items()
}
TIME_S = 1_700_000_000.25


def stored(event: AnyEvent, seq: int = 5) -> Stored:
    return Stored(seq, TIME_S, "", event)


# -- one event -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECORDED)
def test_every_event_is_one_line(kind: str) -> None:
    """With its time and its kind, and its trajectory if it has one."""
    event = RECORDED[kind]
    line = event_line(stored(event))
    assert "\n" not in line
    assert line.startswith(f"22:13:20.250  {kind}")
    assert getattr(event, "trajectory", "") in line


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("admitted", "task 47x86: 'What is 47 * 86?'"),
        ("turn", "'<python>47*86</python>' (stop), 2 tokens by versions 7-8"),
        ("result", "'4042' (12 ms)"),
        ("scored", "reward 1"),
        ("evaluated", "reward 0.5"),
        ("expired", "too stale"),
        ("failed", "deadline.gen: 'no event for 120 s, 3 times'"),
        ("filtered", "g12: zero_variance"),
        ("step", "9 begins with 2 trajectories"),
        ("stepped", "9 made version 9, loss -0.1250"),
        ("warmed", "20/200 loss 2.500"),
        ("joined", "learner.learning_rate=1e-4"),
        ("stopping", "`actors stop`"),
        ("ended", "all steps done"),
    ],
)
def test_a_line_says_what_happened(kind: str, says: str) -> None:
    assert event_line(stored(RECORDED[kind])).endswith(says)


def test_a_line_stays_short() -> None:
    """Whatever a policy writes."""
    turn = Turn(trajectory="g0-0-0", tokens=Tokens(), text="a\nb" * 100, last=True)
    line = event_line(stored(turn))
    assert len(line) < 160
    assert line.endswith("…' (last), 0 tokens by no version")


def test_a_policy_s_text_does_not_steer_the_terminal() -> None:
    """Control characters are spelled out, in a line and in the whole."""
    hostile = "\x1b[2J\x9b31m\u202e\a"
    line = event_line(stored(turn("g0-0-0", hostile)))
    text = text_of(life()[0], turn("g0-0-0", hostile, last=True))
    assert all(character.isprintable() for character in line)
    assert all(character.isprintable() for character in text.replace("\n", ""))
    assert "\\x1b[2J" in text


@pytest.mark.parametrize("kind", RECORDED)
def test_every_event_is_one_json_object(kind: str) -> None:
    """On one line, with its place in the log."""
    text = event_json(stored(RECORDED[kind]))
    assert "\n" not in text
    told = json.loads(text)
    assert (told["kind"], told["seq"], told["time_s"]) == (kind, 5, TIME_S)


def test_json_has_token_arrays_as_lists() -> None:
    """Nothing is left packed."""
    told = json.loads(event_json(stored(RECORDED["turn"])))
    assert told["tokens"] == {
        "ids": [1, 2, 70_000, 3, 4],
        "mask": [0, 0, 0, 1, 1],
        "logprobs": [0.0, 0.0, 0.0, -0.25, -1.5],
        "versions": [-1, -1, -1, 7, 8],
    }
    assert told["calls"] == [{"tool": "python", "arguments": {"code": "47*86"}}]


# -- one trajectory --------------------------------------------------------------------------------

CALL = Call(tool="python", arguments={"code": "47*86"})


def turn(name: str, text: str, *calls: Call, last: bool = False, feedback: str = "") -> Turn:
    tokens = Tokens.given([1, 2]) + Tokens.sampled([3, 4], [-0.25, -0.5], [7, 8])
    return Turn(
        trajectory=name,
        replica="generator-1",
        tokens=tokens,
        text=text,
        calls=list(calls),
        feedback=feedback,
        last=last,
    )


def life(name: str = "g0-0-0") -> list[AnyEvent]:
    public = PublicPart(messages=[ChatMessage(role="user", content="What is 47 * 86?")])
    return [
        Admitted(trajectory=name, task="47x86", public=public, private_key="g0"),
        turn(name, "<python>47*86</python>", CALL),
        Result(trajectory=name, turn=0, call=0, text="first line\nsecond", ok=False, tier="ns"),
        turn(name, "<python>oops", feedback="not closed"),
        turn(name, "It is 4042.", last=True),
        Scored(trajectory=name, reward=0.5, parts={"answered": 1.0}, replica="scorer-1"),
    ]


def text_of(*events: AnyEvent) -> str:
    state = fold_all((event, seq) for seq, event in enumerate(events, 1))  # type: ignore[misc]
    assert state is not None
    return trajectory_text(state)


def test_a_trajectory_is_shown_whole() -> None:
    """From the prompt to the reward, every turn, call, observation and version, in order."""
    text = text_of(*life())
    position = 0
    for part in (
        *("trajectory g0-0-0", "47x86", "What is 47 * 86?"),
        *("turn 0", "2 tokens given, 2 sampled by versions 7-8", "logprob -0.750"),
        *("<python>47*86</python>", "result 0.0   error", "first line", "second"),
        *("turn 1", "<python>oops", "feedback", "not closed"),
        *("turn 2", "It is 4042.", "reward 0.5", "answered", "scorer-1"),
    ):
        found = text.find(part, position)
        assert found >= 0, part
        position = found
    assert "in flight" not in text


def test_a_trajectory_in_flight_says_who_is_next() -> None:
    assert text_of(*life()[:1]).rstrip().endswith("in flight   next: gen")
    assert text_of(*life()[:2]).endswith("in flight   next: tool python")


def test_a_failed_trajectory_says_why() -> None:
    cause = Cause(boundary="tool", code="gone", detail="no socket")
    text = text_of(*life()[:2], Failed(trajectory="g0-0-0", cause=cause))
    assert text.endswith("failed   tool.gone: 'no socket'")


# -- who is alive ----------------------------------------------------------------------------------


def beat(role: str, number: int, **more: object) -> Heartbeat:
    return Heartbeat(
        run="r",
        role=role,  # type: ignore[arg-type]
        replica=f"{role}-host-{number}",
        host="host",
        pid=number,
        up_s=12.3,
        **more,  # type: ignore[arg-type]
    )


def test_the_living_are_a_table() -> None:
    """One replica a line, by role, with the thing that it holds longest."""
    held = [
        Held(trajectory="g0-0-0", stage="gen", for_s=0.5),
        Held(trajectory="g0-1-0", stage="gen", for_s=2.5),
    ]
    table = alive_table(
        "r",
        "nats://h:1",
        [
            beat("toolbox", 3, phase="draining"),
            beat(
                "generator",
                2,
                policy_version=7,
                held=held,
                held_count=70,
                rss_bytes=100 << 20,
            ),
        ],
    )
    head, first, second = (re.split(r"  +", line) for line in table.splitlines())
    assert head[:3] == ["ROLE", "REPLICA", "PID"]
    assert first == [
        *("generator", "generator-host-2", "2", "12 s", "7", "70", "g0-1-0 2.5 s"),
        *("100 MB", "working"),
    ]
    assert second[4:] == ["-", "0", "-", "0 MB", "draining"]


def test_nobody_alive_is_said() -> None:
    """Where nobody was heard, too."""
    assert alive_table("r", "nats://h:1", []) == (
        "run r at nats://h:1: nobody gives a sign of life"
    )


STALL = Stall(kind="held", subject="g0-1-0", detail="g0-1-0 (tool) is held by x", for_s=14.2)


def test_what_stands_still_is_a_line() -> None:
    """As the dispatcher says it; when none acts, the beats say so themselves."""
    assert stall_lines([beat("dispatcher", 1, stalls=[STALL])]) == [
        "stall: g0-1-0 (tool) is held by x, for 14 s"
    ]
    assert stall_lines([beat("dispatcher", 1)]) == []
    (line,) = stall_lines([beat("dispatcher", 1, phase="standby")])
    assert line == "stall: no dispatcher holds the lease: 1 wait for it"
    assert stall_lines([]) == [], "nobody at all is told by the table"


# -- what a run leaves behind ----------------------------------------------------------------------


def stepped(step: int, reward: float) -> Stepped:
    row = {
        "step": step,
        "reward_mean": reward,
        "loss": -0.125,
        "staleness_mean": 0.5,
        "tool_call_rate": 0.25,
        "trajectories": 128,
        "gen_tokens_per_s": 1000.0,
        "step_s": 1.5,
        "failed_by_cause": {"tool.gone": step},
    }
    return Stepped(step=step, policy_version=step, weights_sha256="", metrics=row)


RUN: list[AnyEvent] = [
    Warmed(step=10, steps=20, metrics={"step": 10.0, "loss": 2.5}),
    *life("g0-0-0"),
    Evaluated(trajectory="e0x0-0-0", reward=1.0),
    Evaluated(trajectory="e0x1-0-0", reward=0.0),
    stepped(1, 0.25),
    stepped(2, 0.75),
    Evaluated(trajectory="e2x0-0-0", reward=1.0),
    Ended(reason="all steps done"),
]


def report(folder: Path) -> Report:
    made = Report(folder)
    for seq, event in enumerate(RUN, 1):
        made.observe(stored(event, seq))
    made.close()
    return made


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_its_rows_and_its_curve(tmp_path: Path) -> None:
    """metrics.jsonl has a step a line, as the learner wrote it; the rest is told apart."""
    made = report(tmp_path)
    rows = [event.metrics for event in RUN if isinstance(event, Stepped)]
    assert lines(tmp_path / "metrics.jsonl") == rows == made.rows
    assert lines(tmp_path / "cold_start.jsonl") == [{"step": 10.0, "loss": 2.5}]
    assert lines(tmp_path / "evaluations.jsonl") == [
        {"policy_version": 0, "rows": 2, "reward_mean": 0.5},
        {"policy_version": 2, "rows": 1, "reward_mean": 1.0},
    ]
    assert made.evaluation_means() == {0: 0.5, 2: 1.0}
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/reward_mean" in board.read_bytes()


def test_a_resumed_run_s_report_repeats_nothing(tmp_path: Path) -> None:
    """It is written anew from the log."""
    report(tmp_path)
    report(tmp_path)
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_rows_are_there_as_soon_as_they_are_known(tmp_path: Path) -> None:
    """A run that is killed leaves what it had."""
    made = Report(tmp_path)
    made.observe(stored(stepped(1, 0.25)))
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    made.close()


def test_a_run_without_steps_has_no_curve(tmp_path: Path) -> None:
    Report(tmp_path).close()
    assert not (tmp_path / "reward.png").exists()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_an_evaluation_s_version_is_in_its_name() -> None:
    assert evaluated_version("e12x3-0-1") == 12
    assert evaluated_version("g1r1-0-0") is None


# -- progress --------------------------------------------------------------------------------------

RECIPE = Recipe(policy=Policy(model="m"), learner=Learner(steps=35))


def shown(events: list[AnyEvent], *, terminal: bool, fleet: list[Heartbeat] | None = None) -> str:
    width = 160 if terminal else 40  # a file has no width
    console = Console(file=StringIO(), width=width, force_terminal=terminal, color_system=None)
    progress = Progress("r", RECIPE, console)
    for seq, event in enumerate(events, 1):
        progress.observe(stored(event, seq), live=True)
    progress.see(fleet or [], 0.0)
    if terminal:
        console.print(progress._table())
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_step_is_a_line() -> None:
    """And the cold start, and nothing of what each trajectory does."""
    assert shown(RUN, terminal=False).splitlines() == [
        "cold start 10/20  loss 2.500",
        step_line(stepped(1, 0.25), 35),
        step_line(stepped(2, 0.75), 35),
    ]
    assert step_line(stepped(2, 0.75), 35) == (
        "step 2/35  reward 0.750  loss -0.1250  staleness 0.5  128 trajectories  "
        "1000 tokens/s  1.5 s  failed 2"
    )


def test_what_went_before_a_resume_is_not_told_again() -> None:
    """It counts, but only what is new has a line."""
    console = Console(file=StringIO(), width=160)
    progress = Progress("r", RECIPE, console)
    for event in RUN:
        progress.observe(stored(event), live=False)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue() == ""


def test_a_terminal_shows_where_trajectories_are() -> None:
    """Each is in one stage, until it is trained, filtered or ended."""
    events: list[AnyEvent] = [
        *life("g0-0-0"),
        *life("g0-1-0")[:1],
        *life("g1-0-0")[:2],
        *life("g1-1-0")[:5],
        *life("g2-0-0"),
        Filtered(group="g2", reason="stale", trajectories=["g2-0-0"]),
        *life("g3-0-0"),
        Step(step=1, start_version=0, trajectories=["g3-0-0"]),
        *life("g4-0-0")[:2],
        Failed(trajectory="g4-0-0", cause=Cause(boundary="tool", code="gone")),
        Evaluated(trajectory="e0x0-0-0", reward=1.0),
        stepped(1, 0.25),
    ]
    fleet = [beat("generator", 1, policy_version=4), beat("generator", 2, policy_version=5)]
    text = shown(events, terminal=True, fleet=fleet)
    assert "gen 1   tool 1   score 1   scored 1" in text
    assert "tool.gone x1" in text
    assert "version 0: 1.000 (1 tasks)" in text
    assert "1/35   reward 0.250" in text
    assert "generator x2   policy versions [4, 5]" in text


def test_without_a_terminal_a_stall_is_told_when_it_begins_and_ends() -> None:
    """Once each, with how long it was; a missing dispatcher has some seconds to come back."""
    console = Console(file=StringIO(), width=160)
    progress = Progress("r", RECIPE, console)
    acting = beat("dispatcher", 1)
    standing = [beat("dispatcher", 1, stalls=[STALL])]
    for now_s, beats in ((10.0, standing), (11.0, standing), (12.0, [acting]), (13.0, [])):
        progress.see(beats, now_s)
    for now_s in (20.0, 22.0, 23.0):
        progress.see([beat("scorer", 1)], now_s)
    progress.see([acting], 24.0)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().splitlines() == [
        "stall: g0-1-0 (tool) is held by x, for 14 s",
        "over: g0-1-0 (tool) is held by x, for 14 s",
        "stall: no dispatcher is there: nothing is admitted, replaced or swept, for 9 s",
        "over: no dispatcher is there: nothing is admitted, replaced or swept, for 10 s",
    ]


def test_a_terminal_shows_what_stands_still() -> None:
    fleet = [beat("dispatcher", 1, stalls=[STALL])]
    assert "g0-1-0 (tool) is held by x, for 14 s" in shown([], terminal=True, fleet=fleet)


@pytest.mark.parametrize(
    ("event", "note"), [(Paused(), "paused"), (Resumed(), "training"), (Ended(reason=""), "ending")]
)
def test_a_terminal_shows_what_the_run_is_doing(event: AnyEvent, note: str) -> None:
    assert note in shown([event], terminal=True)
