"""The rules that the log of every run obeys, by name, and the report that `actors verify` makes of them."""

from typing import Literal, get_args

import msgspec

from actors.live import ATTEMPTS

Fate = Literal["trained", "filtered", "evaluated", "finished", "expired", "failed", "dropped"]
FATES: tuple[Fate, ...] = get_args(Fate)

Rule = Literal[
    "never_admitted",
    "admitted_twice",
    "after_end",
    "two_fates",
    "trained_twice",
    "filtered_twice",
    "broken_group",
    "step_order",
    "step_repeated",
    "stepped_unbegun",
    "filtered_unlisted",
    "version_not_step",
    "too_many_attempts",
    "replaced_unfailed",
    "out_of_turn",
    "unasked_result",
    "result_twice",
    "unpublished_version",
    "too_stale",
    "in_flight_at_end",
    "prompt_skipped",
    "prompt_repeated",
]
RULES: dict[Rule, str] = {
    "never_admitted": "something happened to a trajectory that was never admitted",
    "admitted_twice": "admitted twice",
    "after_end": "something happened after the end",
    "two_fates": "ended in two ways",
    "trained_twice": "trained in two steps, or twice in one",
    "filtered_twice": "filtered twice",
    "broken_group": "taken by the learner with a member missing, twice, unscored or of another task",
    "step_order": "a step begun or made out of order, or not from the version before it",
    "step_repeated": "a step begun or made twice",
    "stepped_unbegun": "a step made that was never begun",
    "filtered_unlisted": "a step that does not list just the groups filtered since the last one",
    "version_not_step": "a step that made another version than its own",
    "too_many_attempts": f"more than {ATTEMPTS} attempts of a member",
    "replaced_unfailed": "a second attempt of a member whose first had not failed",
    "out_of_turn": "an event that cannot follow the one before it",
    "unasked_result": "a result of a call that the turn did not make",
    "result_twice": "two results of one call",
    "unpublished_version": "sampled by a version not yet published, or by another than admission asks for",
    "too_stale": "trained although sampled by too old a version",
    "in_flight_at_end": "the run has ended without it",
    "prompt_skipped": "the prompt was never admitted, later ones were",
    "prompt_repeated": "the prompt was admitted again, though its group had not expired",
}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the accounts come to; what `actors verify --json` prints."""

    run: str
    balanced: bool
    ended: bool
    archived: bool
    """What the log held is in a file too, and may be deleted here: then there is nothing left to count."""
    steps: int
    """Steps made, each with its `stepped`."""
    admitted: int
    fates: dict[Fate, int]
    in_flight: int
    in_flight_by_stage: dict[str, int]
    """`gen`, `tool`, `score`, or `scored`: waiting for its group and the learner."""
    failed_by_cause: dict[str, int]
    filtered_by_reason: dict[str, int]
    broken: dict[Rule, list[str]]
    """Rule → the trajectories, groups and steps that break it, in the order in which they do."""
    junk: int = 0
    """Stored messages from which no event could be read."""
    dead_letters: int = 0
