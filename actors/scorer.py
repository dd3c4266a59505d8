"""The scorer: gives a finished trajectory its reward. It alone reads the private part of a task."""

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ClassVar

from actors.actor import HopFailed
from bus.subjects import Stage
from rewards.errors import RewardError
from rewards.reward import Reward, RewardFunction
from schemas.events import Evaluated, Event, Scored
from schemas.task import TaskRow
from schemas.trajectory import Trajectory
from tools.errors import ToolError
from tools.repositories import Repositories
from tools.sandbox.sandbox import Limits, Outcome, Sandbox

LoadPrivate = Callable[[str], Awaitable[dict[str, Any]]]
"""The private part of a task, by its key."""


class Scorer:
    """Scores trajectories; several at once."""

    stage: ClassVar[Stage] = "score"
    produces: ClassVar[tuple[type[Event], ...]] = (Scored, Evaluated)

    def __init__(
        self,
        reward: RewardFunction,
        load_private: LoadPrivate,
        sandbox: Sandbox,
        replica: str,
        repositories: Repositories | None = None,
    ) -> None:
        self._reward = reward
        self._load_private = load_private
        self._sandbox = sandbox
        self._replica = replica
        self._repositories = repositories

    async def handle(self, state: Trajectory) -> Scored | Evaluated:
        """Score one trajectory."""
        admitted = state.admitted
        private = await self._load_private(admitted.private_key)
        task = TaskRow(id=admitted.task, public=admitted.public, private=private)
        try:
            given = await self._reward(task, state, partial(self._run, task))
            reward = given if isinstance(given, Reward) else Reward(value=given)
        except (RewardError, ToolError) as error:
            raise HopFailed(error.boundary, error.code, error.detail) from error
        kind = Evaluated if admitted.purpose == "eval" else Scored
        return kind(
            trajectory=state.id, replica=self._replica, reward=reward.value, parts=reward.parts
        )

    async def _run(
        self,
        task: TaskRow,
        code: str,
        *,
        stdin: bytes = b"",
        wall_s: float | None = None,
        repository: bool = False,
    ) -> Outcome:
        """See rewards.reward.Run."""
        limits = Limits(wall_s=wall_s, cpu_s=math.ceil(wall_s)) if wall_s else Limits()
        if not repository:
            return await self._sandbox.run(code, stdin=stdin, limits=limits)
        if self._repositories is None:
            raise RewardError("no_repositories", "this scorer has none")
        return await self._repositories.run(
            self._sandbox.run, task.public.extra, code, stdin, limits
        )

    async def drain(self) -> None:
        """Nothing: a reward ends by itself."""

    async def close(self) -> None:
        """Kill what still runs."""
        await self._sandbox.close()
