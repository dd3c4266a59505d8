"""A reward of your own: `scorer.reward = "length_reward:length"` in a recipe beside this file.

Rows need `"private": {"max_chars": …}`; policies never see it.
"""

from rewards.reward import Reward, Run
from schemas.task import TaskRow
from schemas.trajectory import Trajectory


async def length(task: TaskRow, trajectory: Trajectory, _run: Run) -> Reward:
    """1 for a last turn within the limit, less the longer it is."""
    max_chars = task.private["max_chars"]
    chars = len(trajectory.turn_text)
    return Reward(value=min(1.0, max_chars / max(chars, 1)), parts={"chars": float(chars)})
