"""What a reward is: an async function from a task and its finished trajectory to a number.

    async def reward(task: TaskRow, trajectory: Trajectory, run: Run) -> float:
        return float(trajectory.turn_text == task.private["answer"])

Code of the policy, and code that works on its text with a library that may hang, goes through `run`: a fresh
sandbox for each call. An attribute `imports` of the function names modules to have ready there. One that may give
another number the next time says `deterministic = False`: a replay then takes what was recorded.
"""

from collections.abc import Awaitable
from typing import Protocol

import msgspec

from schemas.task import TaskRow
from schemas.trajectory import Trajectory


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """What a trajectory is worth, and numbers worth a chart of their own."""

    value: float
    parts: dict[str, float] = {}


class Ran(Protocol):
    """How one sandboxed call ended; `tools.sandbox.sandbox.Outcome` is one."""

    @property
    def output(self) -> bytes:
        """stdout and stderr as they were interleaved."""
        ...

    @property
    def reason(self) -> str:
        """`exit`, or the limit that ended it."""
        ...

    @property
    def exit_code(self) -> int:
        """0 when all went well."""
        ...


class Run(Protocol):
    """Runs Python code in a fresh sandbox; `tools.sandbox.sandbox.Sandbox.run` is one."""

    def __call__(
        self,
        code: str,
        *,
        stdin: bytes = b"",
        wall_s: float | None = None,
        repository: bool = False,
    ) -> Awaitable[Ran]:
        """Raises when the sandbox, not the code, fails.

        `wall_s`: how long the code may take, by default 10 s. `repository`: it runs in a work tree of the commit that
        the task's `public.extra` names; see tools/repositories.py.
        """
        ...


class RewardFunction(Protocol):
    """Scores one trajectory."""

    async def __call__(self, task: TaskRow, trajectory: Trajectory, run: Run, /) -> float | Reward:
        """Raises RewardError, or what `run` raises, when it cannot: that is never a reward of 0."""
        ...
