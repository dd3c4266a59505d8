"""Live progress in the terminal, folded from the log; a line per step where there is no terminal."""

import time
from collections import Counter

from rich.console import Console
from rich.live import Live
from rich.table import Table

from actors.report import evaluated_version
from bus.log import Stored
from schemas.events import (
    Admitted,
    Ended,
    Evaluated,
    Event,
    Failed,
    Filtered,
    Paused,
    Result,
    Resumed,
    Scored,
    Step,
    Stepped,
    TrajectoryEvent,
    Turn,
    Warmed,
)
from schemas.messages import Heartbeat
from schemas.recipe import Recipe

_REFRESHES_PER_S = 4
_STAGES = ("gen", "tool", "score", "scored")
_RATE_S = 5.0
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
        self._stage: dict[str, str] = {}
        self._calls: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._evaluated: Counter[int] = Counter()
        self._evaluated_sum: Counter[int] = Counter()
        self._sampled: list[tuple[float, int]] = []
        self._ended = 0
        self._note = "starting"
        self._row: dict[str, float] = {}
        self.fleet: list[Heartbeat] = []
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
        if isinstance(event, TrajectoryEvent):
            self._move(event, stored.time_s)
        elif isinstance(event, Step | Filtered):
            for trajectory in event.trajectories:
                self._stage.pop(trajectory, None)
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

    def _move(self, event: TrajectoryEvent, time_s: float) -> None:
        name = event.trajectory
        if isinstance(event, Admitted):
            self._stage[name] = "gen"
        elif isinstance(event, Turn):
            self._sampled.append((time_s, event.tokens.sampled_count))
            self._calls[name] = 0 if event.last else len(event.calls)
            self._stage[name] = "score" if event.last else "tool" if event.calls else "gen"
        elif isinstance(event, Result):
            self._calls[name] -= 1
            self._stage[name] = "tool" if self._calls[name] > 0 else "gen"
        elif isinstance(event, Scored):
            self._calls.pop(name, None)
            self._stage[name] = "scored"
        else:
            self._calls.pop(name, None)
            self._stage.pop(name, None)
            if isinstance(event, Failed):
                self._failed[str(event.cause)] += 1
            elif isinstance(event, Evaluated):
                version = evaluated_version(name)
                self._evaluated[version] += 1
                self._evaluated_sum[version] += event.reward  # type: ignore[assignment]

    def _tokens_per_s(self) -> float:
        if not self._sampled:
            return 0.0
        newest = self._sampled[-1][0]
        self._sampled = [pair for pair in self._sampled if newest - pair[0] < _RATE_S]
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
        stages = Counter(self._stage.values())
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
