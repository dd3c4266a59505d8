"""Where a dispatcher may begin to read the log: what was admitted before has ended, and all its consequences are drawn.

A bookmark is taken while things are open, and is good once they are closed: a later reader does not know them, and
need not. So what a dispatcher reads when it starts depends on what is open, and not on how long the run has lasted.
"""

from collections import deque

from schemas.messages import Bookmark

EVERY = 2000
"""Events between bookmarks; to read as many takes a tenth of a second or two."""


class Bookmarks:
    """The bookmarks of one dispatcher that are not good yet."""

    def __init__(self, seq: int = 0) -> None:
        self._seq = seq
        """Of the newest one."""
        self._taken: deque[Bookmark] = deque()

    def due(self, seq: int) -> bool:
        """Whether one should be taken here."""
        return seq >= self._seq + EVERY

    def take(self, bookmark: Bookmark) -> None:
        """Keep it until it is good."""
        self._taken.append(bookmark)
        self._seq = bookmark.seq

    def closed(self, first_open_seq: int) -> Bookmark | None:
        """The newest that is good, if one has become so; `first_open_seq`: of whatever is open, the first admission."""
        good = None
        while self._taken and self._taken[0].seq < first_open_seq:
            good = self._taken.popleft()
        return good
