"""A scored trajectory as arrays, and a batch of them as one hash.

Shapes: T tokens of a trajectory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack

import numpy as np
from numpy.typing import NDArray

from learner.groups import turn_rewards
from schemas.images import ImageInput
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
    turn_rewards: tuple[float, ...] = ()
    """What the scorer gave to each turn, besides `reward`; shorter when later ones got nothing."""
    images: tuple[ImageInput, ...] = ()
    """What the policy saw; none of their places was sampled."""

    @property
    def prompt_length(self) -> int:
        """The number of given tokens before the first sampled one."""
        return prompt_length(self.mask_T)

    @property
    def sampled_count(self) -> int:
        """How many tokens the policy sampled."""
        return int(np.count_nonzero(self.mask_T))

    @property
    def turn_spans(self) -> list[tuple[int, int]]:
        """Each turn as [first, end): a run of sampled tokens."""
        edges = np.flatnonzero(np.diff(self.mask_T.astype(np.int8), prepend=0, append=0))
        return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def prompt_length(mask_T: BoolArray) -> int:
    """The number of given tokens before the first sampled one; T when nothing was sampled."""
    return int(mask_T.argmax()) if mask_T.any() else len(mask_T)


def batch_sha256(groups: Sequence[Sequence[Sample]]) -> str:
    """The hash of everything that a step trains on, in its order: two batches have the same or differ somewhere.

    Each group is its number of members; each member its name, its tokens' ids, mask, log-probabilities and versions,
    little-endian, each with its length before it, and its reward, and those of its turns and the pixels of its images
    if there are any.
    """
    digest = hashlib.sha256()
    for group in groups:
        digest.update(pack("<q", len(group)))
        for sample in group:
            for part in (
                sample.trajectory.encode(),
                sample.ids_T.astype("<i4", copy=False).tobytes(),
                sample.mask_T.astype(np.uint8).tobytes(),
                sample.logprobs_T.astype("<f4", copy=False).tobytes(),
                sample.versions_T.astype("<i4", copy=False).tobytes(),
            ):
                digest.update(pack("<q", len(part)))
                digest.update(part)
            digest.update(pack("<d", sample.reward))
            digest.update(pack(f"<{len(sample.turn_rewards)}d", *sample.turn_rewards))
            for image in sample.images:
                digest.update(pack("<q", len(image.pixels)))
                digest.update(image.pixels)
    return digest.hexdigest()


def sample_of(trajectory: Trajectory, images: Sequence[ImageInput] = ()) -> Sample:
    """Read a scored trajectory; `images` are those that the policy saw.

    Raises ValueError when it has no reward or begins with a sampled token.
    """
    if trajectory.reward is None:
        raise ValueError(f"{trajectory.id} has no reward")
    tokens = trajectory.tokens
    if tokens.mask[:1] == b"\x01":
        raise ValueError(f"{trajectory.id} begins with a sampled token, which nothing predicts")
    turns = trajectory.turns
    return Sample(
        trajectory=trajectory.id,
        group=trajectory.group,
        ids_T=np.frombuffer(tokens.ids, dtype="<i4").astype(np.int32, copy=False),
        mask_T=np.frombuffer(tokens.mask, dtype=np.uint8).astype(np.bool_),
        logprobs_T=np.frombuffer(tokens.logprobs, dtype="<f4").astype(np.float32, copy=False),
        versions_T=np.frombuffer(tokens.versions, dtype="<i4").astype(np.int32, copy=False),
        reward=trajectory.reward,
        truncated=bool(turns) and turns[-1].finish_reason == "length",
        turns=trajectory.turn_count,
        tool_calls=len(trajectory.results),
        turn_rewards=turn_rewards(trajectory),
        images=tuple(images),
    )
