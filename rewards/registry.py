"""Names to rewards: built in, from an installed package, or `module:function` beside the recipe."""

from typing import cast

from rewards.errors import BadReward, UnknownReward
from rewards.reward import Reward, RewardFunction, Run
from schemas import names
from schemas.task import TaskRow
from schemas.trajectory import Trajectory

ENTRY_POINTS = "agentic_actors.rewards"
BUILT_IN = {
    "exact": "rewards.exact:exact",
    "math": "rewards.math:math",
    "repo_tests": "rewards.repo_tests:repo_tests",
    "repo_tests_share": "rewards.repo_tests:repo_tests_share",
}


class CheckedReward:
    """A reward function whose numbers are checked: one that is not finite would poison a whole step."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name = name
        self.imports: tuple[str, ...] = tuple(getattr(function, "imports", ()))
        """Modules to have ready in the sandbox."""
        self.deterministic = bool(getattr(function, "deterministic", True))
        """The same trajectory always gets the same number, so that a replay can check it."""
        self._function = function

    async def __call__(self, task: TaskRow, trajectory: Trajectory, run: Run) -> Reward:
        """See RewardFunction. Raises BadReward for what is not a finite number."""
        given = await self._function(task, trajectory, run)
        reward = given if isinstance(given, Reward) else Reward(value=given)
        for part, number in {"value": reward.value, **reward.parts}.items():
            if not _is_finite(number):
                raise BadReward(
                    "not_finite", f"{self.name} gave {number!r} as its {part} for {trajectory.id}"
                )
        return Reward(
            value=float(reward.value),
            parts={part: float(number) for part, number in reward.parts.items()},
        )


_LARGEST = 3.4e38
"""Of a float32, in which the learner has it."""


def load_reward(name: str, recipe_dir: str = "") -> CheckedReward:
    """The reward of the name. Raises UnknownReward for a name that leads nowhere."""
    try:
        found = names.find(name, recipe_dir, built_in=BUILT_IN, group=ENTRY_POINTS)
    except names.UnknownName as error:
        raise UnknownReward("unknown_reward", str(error)) from error
    return CheckedReward(name, cast(RewardFunction, found))


def _is_finite(number: object) -> bool:
    try:
        return abs(cast(float, number)) <= _LARGEST
    except (TypeError, ValueError):
        return False
