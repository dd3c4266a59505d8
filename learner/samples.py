"""A scored trajectory as arrays.

Shapes: T tokens of a trajectory.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.trajectory import Trajectory

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """What the learner needs of one trajectory; made by `sample_of`, read by `Policy.train_step`."""

    trajectory: str
    group: str
    ids_T: IntArray
    mask_T: BoolArray
    """True where the policy sampled the token."""
    logprobs_T: FloatArray
    """The engine's, at the sampling temperature; 0 where given."""
    versions_T: IntArray
    """The policy version that sampled the token; -1 where given."""
    reward: float
    truncated: bool = False
    """It ended at a limit, not by itself."""
    turns: int = 1
    tool_calls: int = 0
    """Calls that were run."""

    @property
    def prompt_length(self) -> int:
        """The number of given tokens before the first sampled one."""
        return prompt_length(self.mask_T)

    @property
    def sampled_count(self) -> int:
        """How many tokens the policy sampled."""
        return int(np.count_nonzero(self.mask_T))


def prompt_length(mask_T: BoolArray) -> int:
    """The number of given tokens before the first sampled one; T when nothing was sampled."""
    return int(mask_T.argmax()) if mask_T.any() else len(mask_T)


def sample_of(trajectory: Trajectory) -> Sample:
    """Read a scored trajectory.

    Raises ValueError when it has no reward or begins with a sampled token.
    """
    if trajectory.reward is None:
        raise ValueError(f"{trajectory.id} has no reward")
    tokens = trajectory.tokens
    if tokens.mask[:1] == b"\x01":
        raise ValueError(f"{trajectory.id} begins with a sampled token, which nothing predicts")
    last = trajectory.turns[-1] if trajectory.turns else None
    return Sample(
        trajectory=trajectory.id,
        group=trajectory.group,
        ids_T=np.frombuffer(tokens.ids, dtype="<i4").astype(np.int32, copy=False),
        mask_T=np.frombuffer(tokens.mask, dtype=np.uint8).astype(np.bool_),
        logprobs_T=np.frombuffer(tokens.logprobs, dtype="<f4").astype(np.float32, copy=False),
        versions_T=np.frombuffer(tokens.versions, dtype="<i4").astype(np.int32, copy=False),
        reward=trajectory.reward,
        truncated=last is not None and (last.finish_reason != "stop" or bool(last.calls)),
        turns=sum(turn.finish_reason != "partial" for turn in trajectory.turns),
        tool_calls=len(trajectory.results),
    )
