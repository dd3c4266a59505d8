"""Live progress in the terminal, folded from the log; a line per step where there is no terminal."""

import time
from collections import Counter, deque

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from actors.place import Place
from actors.report import evaluated_version
from actors.watchdog import Key, known_stalls, without_dispatcher
from bus.log import Stored
from schemas.events import (
    TERMINAL,
    AnyTrajectoryEvent,
    Dropped,
    Ended,
    Evaluated,
    Event,
    Expired,
    Failed,
    Filtered,
    Finished,
    Paused,
    Resumed,
    Step,
    Stepped,
    Turn,
    Warmed,
)
from schemas.messages import Heartbeat, Stall
from schemas.recipe import Recipe

_REFRESHES_PER_S = 4
_STAGES = ("gen", "tool", "score", "scored")
_RATE_S = 5.0
_ALONE_S = 8.0
"""A run may be without an acting dispatcher for so long, while it starts or another takes over."""
_STALLS_SHOWN = 5
_NOTES: dict[type[Event], str] = {
    Paused: "paused: `actors resume` goes on",
    Resumed: "training",
    Ended: "ending",
}


class Progress:
    """What a person wants to see of a run that goes on."""

    def __init__(self, run: str, recipe: Recipe, console: Console) -> None:
        self._run = run
        self._recipe = recipe
        self._console = console
        self._place: dict[str, Place] = {}
        self._failed: Counter[str] = Counter()
        self._evaluated: Counter[int] = Counter()
        self._evaluated_sum: Counter[int] = Counter()
        self._sampled: deque[tuple[float, int]] = deque()
        self._ended = 0
        self._note = "starting"
        self._row: dict[str, float] = {}
        self.fleet: list[Heartbeat] = []
        self._stalls: dict[Key, Stall] = {}
        self._alone_s = 0.0
        """Since when no dispatcher acts; 0 while one does."""
        self._begun_s = time.monotonic()
        self._live = Live(
            console=console, refresh_per_second=_REFRESHES_PER_S, get_renderable=self._table
        )

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def observe(self, stored: Stored, *, live: bool) -> None:
        """Take one event in; `live` ones are also told, where there is no terminal to show them."""
        event = stored.event
        if isinstance(event, AnyTrajectoryEvent):
            self._move(event, stored.time_s)
        elif isinstance(event, Step | Filtered):
            for trajectory in event.trajectories:
                self._place.pop(trajectory, None)
        elif isinstance(event, Stepped):
            self._row = event.metrics
            self._note = "training"
            if live:
                self._say(step_line(event, self._recipe.learner.steps))
        elif isinstance(event, Warmed):
            self._note = f"cold start {event.step}/{event.steps}"
            if live:
                self._say(
                    f"cold start {event.step}/{event.steps}  loss {event.metrics['loss']:.3f}"
                )
        else:
            self._note = _NOTES.get(type(event), self._note)

    def _move(self, event: AnyTrajectoryEvent, time_s: float) -> None:
        name = event.trajectory
        if isinstance(event, TERMINAL):
            self._place.pop(name, None)
            self._count(event)
            return
        self._place[name] = self._place.get(name, Place()).after(event)
        if isinstance(event, Turn):
            self._sampled.append((time_s, event.tokens.sampled_count))
            while time_s - self._sampled[0][0] >= _RATE_S:
                self._sampled.popleft()

    def _count(self, event: Evaluated | Expired | Failed | Dropped | Finished) -> None:
        if isinstance(event, Failed):
            self._failed[str(event.cause)] += 1
        elif isinstance(event, Evaluated):
            version = evaluated_version(event.trajectory)
            if version is not None:
                self._evaluated[version] += 1
                self._evaluated_sum[version] += event.reward  # type: ignore[assignment]

    def see(self, beats: list[Heartbeat], now_s: float) -> None:
        """Who is alive, and what they say stands still; where there is no terminal each stall is told once."""
        self.fleet = beats
        stalls = known_stalls(beats)
        if why := without_dispatcher(beats):
            self._alone_s = self._alone_s or now_s
            if now_s - self._alone_s > _ALONE_S:
                stall = Stall(
                    kind="dispatcher", subject="", detail=why, for_s=now_s - self._alone_s
                )
                stalls[("dispatcher", "")] = stall
        else:
            self._alone_s = 0.0
        for key in stalls.keys() - self._stalls.keys():
            self._say(f"stall: {stalls[key]}")
        for key in self._stalls.keys() - stalls.keys():
            self._say(f"over: {self._stalls[key]}")
        self._stalls = stalls

    def _tokens_per_s(self) -> float:
        if not self._sampled:
            return 0.0
        return sum(count for _, count in self._sampled) / _RATE_S

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        elapsed = time.monotonic() - self._begun_s
        row = self._row
        table.add_row("run", f"{self._run}   {elapsed:.0f} s   {self._note}")
        if row:
            table.add_row(
                "step",
                f"{row['step']:.0f}/{self._recipe.learner.steps}   reward {row['reward_mean']:.3f}   "
                f"staleness {row['staleness_mean']:.1f}   tool calls {row['tool_call_rate']:.0%}   "
                f"{row['step_s']:.1f} s",
            )
        stages = Counter(place.stage for place in self._place.values())
        flight = "   ".join(f"{stage} {stages[stage]}" for stage in _STAGES)
        table.add_row("in flight", f"{flight}   sampling {self._tokens_per_s():.0f} tokens/s")
        for version in sorted(self._evaluated):
            count = self._evaluated[version]
            mean = self._evaluated_sum[version] / count
            table.add_row("held out", f"version {version}: {mean:.3f} ({count} tasks)")
        if self.fleet:
            alive = Counter(beat.role for beat in self.fleet)
            versions = sorted({b.policy_version for b in self.fleet if b.policy_version >= 0})
            roles = "   ".join(f"{role} x{count}" for role, count in sorted(alive.items()))
            table.add_row("alive", f"{roles}   policy versions {versions}")
        for cause, count in self._failed.items():
            table.add_row("failed", f"[red]{cause} x{count}[/red]")
        for stall in list(self._stalls.values())[:_STALLS_SHOWN]:
            table.add_row("stall", f"[red]{escape(str(stall))}[/red]")
        for beat in self.fleet:
            if beat.phase and beat.role in ("dispatcher", "learner"):
                table.add_row(beat.role, beat.phase)
        return table

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, soft_wrap=True)


def step_line(event: Stepped, steps: int) -> str:
    """One step in one line."""
    row = event.metrics
    failed = sum(row["failed_by_cause"].values())
    return (
        f"step {event.step}/{steps}  reward {row['reward_mean']:.3f}  loss {row['loss']:+.4f}  "
        f"staleness {row['staleness_mean']:.1f}  {row['trajectories']} trajectories  "
        f"{row['gen_tokens_per_s']:.0f} tokens/s  {row['step_s']:.1f} s"
        + (f"  failed {failed}" if failed else "")
    )
