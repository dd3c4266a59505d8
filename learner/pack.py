"""Samples as the rows of a few micro-batches: without padding, and a group's prompt is computed once.

    group   p p p a a a      a row:  p p p a a b b     places
            p p p b b b              0 1 2 3 4 3 4     positions: a tail goes on where the prompt ended
                                     └──┬┘ └┬┘ └┬┘
                                        │   │   └── sees p p p b b     segments: each sees itself and what was
                                        │   └────── sees p p p a a     before it, so that every token has the
                                        └────────── sees p p p         past that it has in its own sample

The last token of a sample is only predicted, never an input: that is why a a a takes two places above.

Prompts and tails are cut into segments, attention is computed by segment (learner/attention.py), and everything else
of the model sees one row of tokens. Everything is a pure function of the samples and their order.

Shapes: T tokens of a sample, P places of a row, S segments of it, J places seen by its segments, one after another, K
sampled tokens of a micro-batch, N of the whole batch, I places of a micro-batch at which images stand.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from learner.samples import BoolArray, IntArray, prompt_length
from schemas.images import ImageInput

LongArray = NDArray[np.int64]


class Masked(Protocol):
    """Anything with tokens of which some are trained: a Sample, a Conversation."""

    @property
    def ids_T(self) -> IntArray: ...
    @property
    def mask_T(self) -> BoolArray: ...
    @property
    def images(self) -> tuple[ImageInput, ...]: ...


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One forward and backward pass over one row."""

    ids_P: LongArray
    positions_P: LongArray
    lengths_S: LongArray
    """Places of each segment; they lie side by side."""
    seen_lengths_S: LongArray
    """Places that each segment sees: the last `lengths_S` of them are its own, each seen by itself and those after."""
    seen_J: LongArray
    """Which places these are."""
    sources_K: LongArray
    """The place where each sampled token is predicted."""
    targets_K: LongArray
    """The sampled tokens."""
    tokens_K: LongArray
    """Their indices among the N sampled tokens of the batch, which are in the order of the samples."""
    pixels: tuple[bytes, ...] = ()
    """Of the images, in the order of their places."""
    images_I: LongArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The places at which they stand."""
    unseen: tuple[bytes, ...] = ()
    """Pixels of images that stand nowhere: they are computed for the sake of other ranks, whose images are more."""


class _Tail(NamedTuple):
    """A member of a group without what it shares."""

    member: Masked
    inputs: int
    """Tokens that are computed: all before the last sampled one."""
    first_token: int
    """The index of its first sampled token among the N of the batch."""


@dataclass(slots=True)
class _Tree:
    """A shared prompt and the tails that see it."""

    prefix: int
    tails: list[_Tail]
    length: int


def pack(groups: Sequence[Sequence[Masked]], microbatch_tokens: int) -> list[MicroBatch]:
    """Lay groups out in micro-batches of at most `microbatch_tokens` places each.

    A sample longer than that has a micro-batch of its own. A sample without sampled tokens takes no part. Members
    of a group share the given tokens that all of them begin with; a group of one shares nothing, and one that is too
    large for a micro-batch is cut into several, each with the prompt.
    """
    trees: list[_Tree] = []
    first_token = 0
    for group in groups:
        tails = []
        for member in group:
            sampled = np.flatnonzero(member.mask_T)
            if len(sampled):
                tails.append(_Tail(member, int(sampled[-1]), first_token))
            first_token += len(sampled)
        if tails:
            trees += _trees(tails, microbatch_tokens)
    rows: list[_Row] = []
    for tree in sorted(trees, key=lambda tree: -tree.length):  # first fit by decreasing length
        room = (row for row in rows if row.places + tree.length <= microbatch_tokens)
        row = next(room, None)
        if row is None:
            row = _Row()
            rows.append(row)
        row.add(tree)
    return [row.micro_batch() for row in rows]


def _trees(tails: list[_Tail], microbatch_tokens: int) -> list[_Tree]:
    """A group as one tree, or as few as fit into a micro-batch each."""
    prefix = _common_prompt([tail.member for tail in tails])
    trees: list[_Tree] = []
    for tail in tails:
        own = tail.inputs - prefix
        if trees and trees[-1].length + own <= microbatch_tokens:
            trees[-1].tails.append(tail)
            trees[-1].length += own
        else:
            trees.append(_Tree(prefix, [tail], prefix + own))
    return trees


def _common_prompt(members: Sequence[Masked]) -> int:
    """How many given tokens, with their images, all members begin with; 0 for one member, which shares with nobody."""
    if len(members) == 1:
        return 0
    first = members[0]
    shared = min(prompt_length(member.mask_T) for member in members)
    for member in members[1:]:
        differs = first.ids_T[:shared] != member.ids_T[:shared]
        shared = int(differs.argmax()) if differs.any() else shared
    for image in first.images:
        whole = image.places[-1] < shared
        if not whole or any(image not in member.images for member in members[1:]):
            return min(shared, image.places[0])
    return shared


class _Row:
    """A micro-batch being written."""

    def __init__(self) -> None:
        self._parts: defaultdict[str, list[Any]] = defaultdict(list)
        self._pixels: list[bytes] = []
        self.places = 0

    def add(self, tree: _Tree) -> None:
        """The prompt, if there is one, and each tail, if anything of it is an input."""
        prefix = self._segment(tree.tails[0].member, tree.prefix, np.arange(0))
        for tail in tree.tails:
            own = self._segment(tail.member, tail.inputs, prefix)
            sampled = np.flatnonzero(tail.member.mask_T)
            self._parts["sources_K"].append(np.concatenate([prefix, own])[sampled - 1])
            self._parts["targets_K"].append(tail.member.ids_T[sampled])
            self._parts["tokens_K"].append(tail.first_token + np.arange(len(sampled)))

    def _segment(self, member: Masked, end: int, before: LongArray) -> LongArray:
        """Give a member's tokens up to `end` places, but for those that have the places `before`; returns these.

        From them they and the places before are seen.
        """
        first = len(before)
        ids = member.ids_T[first:end]
        own = np.arange(self.places, self.places + len(ids))
        self.places += len(own)
        if len(own):
            self._parts["ids_P"].append(ids)
            self._parts["positions_P"].append(len(before) + np.arange(len(own)))
            self._parts["lengths_S"].append([len(own)])
            self._parts["seen_lengths_S"].append([len(before) + len(own)])
            self._parts["seen_J"].append(np.concatenate([before, own]))
        for image in member.images:
            if first <= image.places[0] < end:
                self._pixels.append(image.pixels)
                self._parts["images_I"].append(own[np.array(image.places) - first])
        return own

    def micro_batch(self) -> MicroBatch:
        return MicroBatch(
            **{name: np.concatenate(part).astype(np.int64) for name, part in self._parts.items()},
            pixels=tuple(self._pixels),
            unseen=(),
        )
