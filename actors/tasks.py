"""Which tasks are admitted, and as what: each row once and in order, again where its group was expired.

    g12     the group of row 12
    g12r1   the same task again, after g12 was expired
    e8x3    held-out row 3, evaluated by version 8

Whatever was lost on the way to the log is offered again, since only the log says what was admitted.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import structs

from actors.row_images import RowImage, images_of
from schemas.events import Admitted
from schemas.recipe import Recipe
from schemas.task import TaskRow

_GROUP = re.compile(r"(g(0|[1-9][0-9]{0,8}))(?:r([1-9][0-9]{0,8}))?")
_FAR = 100_000
"""How far beyond the next row no dispatcher has admitted one."""


class Task(NamedTuple):
    """A group, or an evaluation, that may be admitted."""

    group: str
    template: Admitted
    """But for the trajectory and its seed."""
    private: dict[str, Any] | None = None
    """None when it was put away before."""
    images: tuple[RowImage, ...] = ()
    """Of its messages, not put away yet."""


class Tasks:
    """The training tasks in the order of the run."""

    def __init__(self, recipe: Recipe, rows: Iterator[TaskRow]) -> None:
        self._temperature = recipe.sampling.temperature
        self._rows = rows
        self._rows_read = 0
        self._rows_ready: dict[int, TaskRow] = {}
        """Rows read and not yet seen admitted, by number."""
        self._next = 0
        """The number after the highest admitted."""
        self._lost: set[int] = set()
        """Numbers below it whose admission did not reach the log."""
        self._again: dict[str, Admitted] = {}
        """Tasks to be admitted again, by the name of the group that was expired."""
        self._repeats: Counter[str] = Counter()
        """How often each task was admitted again, by the name of its first group."""

    @property
    def repeating(self) -> bool:
        """Whether a task waits for being admitted again."""
        return bool(self._again)

    def marked(self, open_groups: Iterable[str]) -> tuple[int, list[int], dict[str, int]]:
        """What `resume` takes, where none is repeating: of repeats only those that may be repeated again."""
        bases = {base_of(group) for group in open_groups}
        repeats = {base: self._repeats[base] for base in bases if self._repeats[base]}
        return self._next, sorted(self._lost), repeats

    def resume(self, next_row: int, lost_rows: Iterable[int], repeats: Mapping[str, int]) -> None:
        """Go on from there."""
        self._next, self._lost, self._repeats = next_row, set(lost_rows), Counter(repeats)

    def admitted(self, group: str) -> bool:
        """The log shows a group that holds no slot; False when it had one before, which is over."""
        place = _GROUP.fullmatch(group)
        if place is None or int(place[2]) > self._next + _FAR:
            return False  # of no dispatcher
        base, number, repeat = place[1], int(place[2]), place[3]
        new = number >= self._next or number in self._lost
        self._lost |= set(range(self._next, number))
        self._lost.discard(number)
        self._next = max(self._next, number + 1)
        self._rows_ready.pop(number, None)
        if repeat:
            new = int(repeat) > self._repeats[base]
            self._repeats[base] = max(self._repeats[base], int(repeat))
            self._again = {old: task for old, task in self._again.items() if base_of(old) != base}
        return new

    def expired(self, group: str, first: Admitted) -> None:
        """The log shows that a group was expired whole; `first` is one of its admissions."""
        self._again[group] = first

    def upcoming(self, policy_version: int) -> Iterator[Task]:
        """What to admit next, without end; the same again until the log shows it admitted."""
        for old, first in self._again.items():
            base = base_of(old)
            template = structs.replace(first, min_policy_version=policy_version)
            yield Task(f"{base}r{self._repeats[base] + 1}", template)
        for number in itertools.chain(sorted(self._lost), itertools.count(self._next)):
            row = self._row(number)
            template = Admitted(
                trajectory="",
                task=row.id,
                public=row.public,
                private_key=f"g{number}",
                min_policy_version=policy_version,
                temperature=self._temperature,
            )
            yield Task(f"g{number}", template, row.private, images_of(row))

    def _row(self, number: int) -> TaskRow:
        while self._rows_read <= number:
            row = next(self._rows)
            if self._rows_read >= self._next or self._rows_read in self._lost:
                self._rows_ready[self._rows_read] = row
            self._rows_read += 1
        return self._rows_ready[number]


class Evaluations:
    """The held-out tasks, each once for every version that is evaluated."""

    def __init__(self, recipe: Recipe, rows: Sequence[TaskRow]) -> None:
        self._rows = rows
        self._temperature = recipe.evaluation.temperature
        every, steps = recipe.evaluation.every_steps, recipe.learner.steps
        self._versions = sorted({0, steps, *(range(0, steps, every) if every else ())})
        """Those not yet admitted whole."""
        self._whole: set[int] = set()
        """Those that are."""
        self._admitted: set[str] = set()

    def marked(self) -> tuple[list[int], list[str]]:
        """What `resume` takes."""
        self._close()
        names = {name for version in self._versions for name in self._names(version)}
        return sorted(self._whole), sorted(names & self._admitted)

    def resume(self, whole: Iterable[int], admitted: Iterable[str]) -> None:
        """Go on from there."""
        self._whole, self._admitted = set(whole), set(admitted)
        self._close()

    def admitted(self, group: str) -> None:
        """The log shows an evaluation begun."""
        self._admitted.add(group)

    def upcoming(self, policy_version: int) -> Iterator[Task]:
        """What to evaluate now: also versions that went by too fast to be seen."""
        self._close()
        for version in self._versions:
            if version <= policy_version:
                for name, row in zip(self._names(version), self._rows, strict=True):
                    if name not in self._admitted:
                        template = self._template(name, row, version)
                        yield Task(name, template, row.private, images_of(row))

    def _close(self) -> None:
        """Look which versions are admitted whole."""
        for version in self._versions:
            if self._admitted.issuperset(self._names(version)):
                self._whole.add(version)
        self._versions = [version for version in self._versions if version not in self._whole]

    def _names(self, version: int) -> list[str]:
        return [f"e{version}x{index}" for index in range(len(self._rows))]

    def _template(self, name: str, row: TaskRow, version: int) -> Admitted:
        return Admitted(
            trajectory="",
            task=row.id,
            public=row.public,
            private_key=name,
            purpose="eval",
            min_policy_version=version,
            pinned_policy_version=version,
            temperature=self._temperature,
        )


def place_seed(seed: int, group: str, member: int, attempt: int) -> int:
    """A trajectory's seed, derived from its place."""
    place = f"{seed}.{group}.{member}.{attempt}".encode()
    return int.from_bytes(hashlib.sha256(place).digest()[:8], "little") >> 1


def base_of(group: str) -> str:
    """`g12` of g12 and of its repeats g12r1, g12r2, …"""
    return group.partition("r")[0]
