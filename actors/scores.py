"""How good each version of the policy is, folded from a learner's steps and the held-out evaluations."""

from collections import defaultdict
from typing import Any

from actors.report import evaluated_version
from schemas.events import AnyEvent, Evaluated, Stepped
from schemas.recipe import Learner


class Scores:
    """What a run's log says of its versions."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        """One of metrics.jsonl for each step."""
        self._held_out: defaultdict[int, list[float]] = defaultdict(list)

    def observe(self, event: AnyEvent) -> None:
        """Take one event of the run in; of a learner beside the main one only when it is that one's scores."""
        if isinstance(event, Stepped):
            self.rows.append(event.metrics)
        elif isinstance(event, Evaluated):
            version = evaluated_version(event.trajectory)
            if version is not None:
                self._held_out[version].append(event.reward)

    def held_out(self) -> dict[int, float]:
        """Policy version → mean reward of its evaluation, as far as it has come."""
        return {v: sum(rewards) / len(rewards) for v, rewards in sorted(self._held_out.items())}

    def by_step(self, learner: Learner) -> dict[int, float]:
        """What the best checkpoints are chosen by, of each version that has it."""
        if learner.best_by == "evaluation":
            return self.held_out()
        return {row["step"]: row["reward_mean"] for row in self.rows}
