"""Samples as the rows of a few micro-batches; a group's prompt is computed once.

    group   p p p a a a      a tree:  p p p a a b b      a tree's prompt is seen by all its tails,
            p p p b b b               0 1 2 3 4 3 4      a tail sees the prompt and itself: the same
                                      (positions)        log-probabilities, fewer tokens

The last token of a sample is only predicted, never an input: that is why a a a takes two places above.

Trees are put into rows, first fit by decreasing length; a micro-batch is R rows of L places. Attention costs R * L^2,
padding costs the rest of the layer, and rows about as long as the model is wide lose least to both (measured for
widths 128 and 576): `row_tokens`. Everything is a pure function of the samples and their order.

Shapes: T tokens of a sample, R rows, L places of a row, K sampled tokens of a micro-batch, N of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from learner.samples import BoolArray, IntArray, prompt_length

LongArray = NDArray[np.int64]

_ATTENTION_SHARE = 6
"""At L = 6 * width attention costs a Llama layer as much as the rest: 4 L^2 w against 2 L * 12 w^2 operations."""


class Masked(Protocol):
    """Anything with tokens of which some are trained: a Sample, a Conversation."""

    @property
    def ids_T(self) -> IntArray: ...
    @property
    def mask_T(self) -> BoolArray: ...


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One forward and backward pass."""

    ids_RL: LongArray
    positions_RL: LongArray
    attend_RLL: BoolArray
    """[row, place, place it sees]; padding sees itself."""
    sources_K: LongArray
    """Where in the flat [R * L] each sampled token is predicted."""
    targets_K: LongArray
    """The sampled tokens."""
    tokens_K: LongArray
    """Their indices among the N sampled tokens of the batch, which are in the order of the samples."""


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


@dataclass(slots=True)
class _Rows:
    """A micro-batch being filled."""

    length: int
    capacity: int
    trees: list[list[_Tree]] = field(default_factory=list)
    free: list[int] = field(default_factory=list)

    def place(self, tree: _Tree) -> bool:
        """Put the tree into the first row with room, or into a new row; False when there is neither."""
        for row, free in enumerate(self.free):
            if free >= tree.length:
                self.trees[row].append(tree)
                self.free[row] -= tree.length
                return True
        if len(self.trees) == self.capacity or tree.length > self.length:
            return False
        self.trees.append([tree])
        self.free.append(self.length - tree.length)
        return True


def pack(
    groups: Sequence[Sequence[Masked]], microbatch_tokens: int, row_tokens: int
) -> list[MicroBatch]:
    """Lay groups out in micro-batches of at most `microbatch_tokens` places each.

    A sample longer than that has a micro-batch of its own. A sample without sampled tokens takes no part. Members
    of a group share the given tokens that all of them begin with; a group of one shares nothing.
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
            trees += _trees(tails, microbatch_tokens, row_tokens)
    batches: list[_Rows] = []
    for tree in sorted(trees, key=lambda tree: -tree.length):
        if not any(batch.place(tree) for batch in batches):
            length = max(tree.length, min(row_tokens, microbatch_tokens))
            batches.append(_Rows(length, max(1, microbatch_tokens // length)))
            batches[-1].place(tree)
    return [_filled(batch) for batch in batches]


def _trees(tails: list[_Tail], microbatch_tokens: int, row_tokens: int) -> list[_Tree]:
    """Split a group into trees: a tail joins the last one where that is cheaper than the prompt once more."""

    def cost(length: int) -> float:
        return length * (1 + max(length, row_tokens) / (_ATTENTION_SHARE * row_tokens))

    prefix = _common_prompt([tail.member for tail in tails])
    trees: list[_Tree] = []
    for tail in tails:
        own = tail.inputs - prefix
        if trees:
            joined = trees[-1].length + own
            cheaper = cost(joined) - cost(trees[-1].length) <= cost(prefix + own)
            if cheaper and joined <= microbatch_tokens:
                trees[-1].tails.append(tail)
                trees[-1].length = joined
                continue
        trees.append(_Tree(prefix, [tail], prefix + own))
    return trees


def _common_prompt(members: Sequence[Masked]) -> int:
    """How many given tokens all members begin with; 0 for one member, which shares with nobody."""
    if len(members) == 1:
        return 0
    first = members[0]
    shared = min(prompt_length(member.mask_T) for member in members)
    for member in members[1:]:
        differs = first.ids_T[:shared] != member.ids_T[:shared]
        shared = int(differs.argmax()) if differs.any() else shared
    return shared


def _filled(rows: _Rows) -> MicroBatch:
    """Write the trees of a full micro-batch into arrays no longer than its longest row."""
    length = rows.length - min(rows.free)
    shape = (len(rows.trees), length)
    ids_RL = np.zeros(shape, np.int64)
    positions_RL = np.zeros(shape, np.int64)
    attend_RLL = np.zeros((*shape, length), np.bool_)
    attend_RLL[:, range(length), range(length)] = True
    sources, targets, tokens = [], [], []
    for row, trees in enumerate(rows.trees):
        start = 0
        for tree in trees:
            prefix = slice(start, start + tree.prefix)
            ids_RL[row, prefix] = tree.tails[0].member.ids_T[: tree.prefix]
            positions_RL[row, prefix] = np.arange(tree.prefix)
            attend_RLL[row, prefix, prefix] = np.tri(tree.prefix, dtype=np.bool_)
            start += tree.prefix
            for tail in tree.tails:
                own = slice(start, start + tail.inputs - tree.prefix)
                ids_RL[row, own] = tail.member.ids_T[tree.prefix : tail.inputs]
                positions_RL[row, own] = np.arange(tree.prefix, tail.inputs)
                attend_RLL[row, own, prefix] = True
                attend_RLL[row, own, own] = np.tri(own.stop - start, dtype=np.bool_)
                sampled = np.flatnonzero(tail.member.mask_T)
                predicts = sampled - 1  # its place within the sample, then within the row
                in_prefix = predicts < tree.prefix
                places = predicts + np.where(in_prefix, prefix.start, start - tree.prefix)
                sources.append(row * length + places)
                targets.append(tail.member.ids_T[sampled])
                tokens.append(tail.first_token + np.arange(len(sampled)))
                start = own.stop
    return MicroBatch(
        ids_RL=ids_RL,
        positions_RL=positions_RL,
        attend_RLL=attend_RLL,
        sources_K=np.concatenate(sources).astype(np.int64),
        targets_K=np.concatenate(targets).astype(np.int64),
        tokens_K=np.concatenate(tokens).astype(np.int64),
    )
