"""What a replay compares: each step as the log has it, rebuilt from its events, and what came of doing it again.

Pure: knows no bus and no torch.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from actors.accounts import Accounts
from actors.errors import UserError
from actors.learner import NAME, Batch, Planner
from schemas.events import AnyEvent, Filtered, Opened, Scored, Step, Stepped, TrajectoryEvent
from schemas.recipe import Recipe
from schemas.trajectory import Trajectory

_STEPS = re.compile(r"(?P<first>[1-9][0-9]*)?(?P<open>:)?(?P<last>[1-9][0-9]*)?")


_OF_SEVERAL_RANKS = {"rel_tol": 1e-3, "abs_tol": 1e-4}


class Difference(NamedTuple):
    """One value that came out otherwise than it was recorded."""

    step: int
    what: str
    recorded: object
    recomputed: object
    trajectory: str = ""
    """Empty for what belongs to the whole step."""

    def __str__(self) -> str:
        where = f"step {self.step}, {self.trajectory}" if self.trajectory else f"step {self.step}"
        return f"{where}: {self.what}: recorded {self.recorded!r}, recomputed {self.recomputed!r}"


class StepRange(NamedTuple):
    """Which steps to replay, both ends included."""

    first: int = 1
    last: int | None = None

    @classmethod
    def parse(cls, text: str) -> "StepRange":
        """Read `A:B`, `A:`, `:B`, `A` or nothing, which is all. Raises UserError."""
        parts = _STEPS.fullmatch(text)
        if parts is None or (parts["last"] and not parts["open"]):
            raise UserError(f"--steps {text}: write A:B, A:, :B or A, counting from 1")
        first = int(parts["first"] or 1)
        last = int(parts["last"]) if parts["last"] else None
        if parts["first"] and not parts["open"]:
            last = first
        if last is not None and last < first:
            raise UserError(f"--steps {text}: there is no step from {first} to {last}")
        return cls(first, last)


class Recorded(NamedTuple):
    """One step as the log has it."""

    recipe: Recipe
    """That was in force when it was made."""
    batch: Batch
    filtered: list[Trajectory]
    """All members of the groups filtered since the step before."""
    stepped: Stepped

    @property
    def scored(self) -> Iterator[Trajectory]:
        """Every trajectory whose reward the step rests on."""
        for group in self.batch.groups:
            yield from group
        yield from self.filtered


class Rebuilding:
    """Folds a log into its recorded steps, beginning after a checkpoint."""

    def __init__(self, checkpoint_step: int) -> None:
        self._checkpoint_step = checkpoint_step
        self._accounts = Accounts()
        self._recipe: Recipe | None = None
        self._planner: Planner
        self._filtered: list[Trajectory] = []

    def observe(self, event: AnyEvent, seq: int, learner: str = NAME) -> Recorded | None:
        """Take one event in; returns the step that it completes.

        Raises UserError for a log whose accounts do not balance: it says nothing that could be recomputed.
        """
        self._accounts.observe(event, learner)
        if self._accounts.broken:
            rule = next(iter(self._accounts.broken))
            raise UserError(f"the log breaks the rule {rule!r}: `actors verify` says where")
        if isinstance(event, Opened):
            if self._recipe is None:
                self._planner = Planner(event.recipe, self._checkpoint_step)
            self._recipe = event.recipe
            return None
        if self._recipe is None or not (isinstance(event, TrajectoryEvent) or learner == NAME):
            return None
        if isinstance(event, Filtered):
            self._filtered += [self._planner.trajectories[name] for name in event.trajectories]
        self._planner.observe(event, seq, 0.0)
        if isinstance(event, Step) and event.step <= self._checkpoint_step:
            self._filtered.clear()
        if not isinstance(event, Stepped) or event.step <= self._checkpoint_step:
            return None
        filtered, self._filtered = self._filtered, []
        return Recorded(self._recipe, self._planner.batches.pop(event.step), filtered, event)


def of_several_ranks(recorded: Stepped) -> bool:
    """Whether it was made by processes that trained together."""
    return int(recorded.metrics.get("ranks", 1)) > 1


def compare_batch(recorded: Recorded, batch_sha256: str) -> Iterator[Difference]:
    """Whether the batch rebuilt from its events is, bit for bit, what the learner trained on."""
    stepped = recorded.stepped
    if stepped.batch_sha256 and stepped.batch_sha256 != batch_sha256:
        yield Difference(stepped.step, "batch_sha256", stepped.batch_sha256, batch_sha256)


def compare_reward(step: int, state: Trajectory, again: Scored | str) -> Iterator[Difference]:
    """A trajectory's reward and its parts; a text says why there is none this time."""
    assert state.scored is not None, "only scored trajectories are trained or filtered"
    if isinstance(again, str):
        yield Difference(step, "reward", state.scored.reward, again, state.id)
        return
    if again.reward != state.scored.reward:
        yield Difference(step, "reward", state.scored.reward, again.reward, state.id)
    elif again.parts != state.scored.parts:
        yield Difference(step, "reward parts", state.scored.parts, again.parts, state.id)


def compare_metrics(recorded: Stepped, recomputed: Mapping[str, Any]) -> Iterator[Difference]:
    """Every recorded metric that is a function of the batch and of the weights before it.

    Several ranks add up in another order than one process: theirs are compared with a tolerance.
    """
    alone = not of_several_ranks(recorded)
    for name, value in recomputed.items():
        if name not in recorded.metrics or (name == "computed_tokens" and not alone):
            continue
        before = recorded.metrics[name]
        if before != value and (alone or not math.isclose(before, value, **_OF_SEVERAL_RANKS)):
            yield Difference(recorded.step, name, before, value)


def compare_weights(recorded: Stepped, weights_sha256: str) -> Iterator[Difference]:
    """The version that the step made; that of several ranks is equal to no bit."""
    if not of_several_ranks(recorded) and recorded.weights_sha256 != weights_sha256:
        yield Difference(recorded.step, "weights_sha256", recorded.weights_sha256, weights_sha256)
