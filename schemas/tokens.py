"""Token facts: what the engine saw and sampled, packed so that any language can read it.

Legend: T tokens. Every array is little-endian and packed: `ids` and `versions` int32, `logprobs` float32,
`mask` uint8.
"""

from collections.abc import Sequence
from struct import pack

import msgspec

GIVEN_VERSION = -1
"""The policy version of a token that no policy sampled."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """A run of T tokens with what is known of each; concatenates with `+`.

    `Tokens.given([5, 6]) + Tokens.sampled([7], [-0.5], [3])` has ids [5, 6, 7], mask [0, 0, 1],
    logprobs [0, 0, -0.5] and versions [-1, -1, 3].
    """

    ids: bytes = b""
    """int32[T]."""
    mask: bytes = b""
    """uint8[T]: 1 where the policy sampled the token, 0 where it was given."""
    logprobs: bytes = b""
    """float32[T]: the engine's log-probability of a sampled token at the sampling temperature, else 0."""
    versions: bytes = b""
    """int32[T]: the policy version that sampled the token, else -1."""

    def __post_init__(self) -> None:
        count = len(self.mask)
        if not len(self.ids) == len(self.logprobs) == len(self.versions) == 4 * count:
            lengths = f"{len(self.ids)}, {len(self.logprobs)}, {len(self.versions)}, {count}"
            raise ValueError(
                f"ids, logprobs and versions need 4 bytes a token and mask 1, not {lengths}"
            )

    @classmethod
    def given(cls, ids: Sequence[int]) -> "Tokens":
        """Tokens of a prompt or an observation."""
        count = len(ids)
        return cls(
            ids=pack(f"<{count}i", *ids),
            mask=bytes(count),
            logprobs=bytes(4 * count),
            versions=pack("<i", GIVEN_VERSION) * count,
        )

    @classmethod
    def sampled(
        cls, ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int]
    ) -> "Tokens":
        """Tokens that a policy sampled."""
        count = len(ids)
        return cls(
            ids=pack(f"<{count}i", *ids),
            mask=b"\x01" * count,
            logprobs=pack(f"<{count}f", *logprobs),
            versions=pack(f"<{count}i", *versions),
        )

    @classmethod
    def join(cls, parts: "Sequence[Tokens]") -> "Tokens":
        """All parts in order; one copy however many there are."""
        return cls(
            ids=b"".join(part.ids for part in parts),
            mask=b"".join(part.mask for part in parts),
            logprobs=b"".join(part.logprobs for part in parts),
            versions=b"".join(part.versions for part in parts),
        )

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens.join((self, other))

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def ids_T(self) -> Sequence[int]:
        """[T] as Python integers."""
        return memoryview(self.ids).cast("i")

    @property
    def logprobs_T(self) -> Sequence[float]:
        """[T] as Python floats."""
        return memoryview(self.logprobs).cast("f")

    @property
    def versions_T(self) -> Sequence[int]:
        """[T] as Python integers."""
        return memoryview(self.versions).cast("i")

    @property
    def sampled_ids(self) -> list[int]:
        """The ids that the policy sampled, in order."""
        return [id_ for id_, own in zip(self.ids_T, self.mask, strict=True) if own]

    @property
    def sampled_count(self) -> int:
        """How many of the T tokens the policy sampled."""
        return self.mask.count(1)

    @property
    def oldest_version(self) -> int | None:
        """The oldest policy version among the sampled tokens; None when nothing was sampled."""
        return min(set(self.versions_T) - {GIVEN_VERSION}, default=None)
