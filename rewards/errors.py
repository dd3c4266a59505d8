"""What can go wrong with rewards. None of these is the policy's fault: a wrong answer is a reward of 0.

RewardError          a reward could not be given
├── UnknownReward    a recipe names a reward that is not there
├── BadReward        a reward function gave something that is not a finite number
└── BadTask          the task's private part does not hold what the reward needs
"""

from schemas.events import Boundary


class RewardError(Exception):
    """A reward could not be given. `boundary` and `code` are short stable names."""

    boundary: Boundary = "scorer"

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{self.boundary}.{code}: {detail}")
        self.code = code
        self.detail = detail


class UnknownReward(RewardError):
    """A recipe names a reward that is not there."""


class BadReward(RewardError):
    """A reward function gave something that is not a finite number."""


class BadTask(RewardError):
    """The task's private part does not hold what the reward needs."""
