"""Waits for what the server answers, and what ends them before it does.

nats-py tells of a refusal to a callback only, in lower case (issue 595), and of a lost link to another, while whoever
waits for an answer waits in vain until its time is up.
"""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nats.errors import ConnectionReconnectingError

from bus.errors import Denied

_REFUSAL = re.compile(r'permissions violation for (publish|subscription)[^"]* (?:to|of) "([^"]+)"')


class Waits:
    """Those of one connection."""

    def __init__(self, role: str) -> None:
        self._role = role
        self.denied: Denied | None = None
        """The first refusal."""
        self.linked: set[Callable[[], None]] = set()
        """Called when there is a link again."""
        self._waiting: dict[str, list[asyncio.Task[Any]]] = {}
        """By subject, in lower case."""
        self._ended: dict[asyncio.Task[Any], Exception] = {}

    def refuse(self, error: Exception) -> Denied | None:
        """Read an error of the server's, and end the waits that it concerns; None when it is no refusal."""
        found = _REFUSAL.search(str(error).lower())
        if found is None:
            return None
        denied = Denied(self._role, found[1], found[2])
        self.denied = self.denied or denied
        self._end(found[2], denied)
        return denied

    async def lose_link(self) -> None:
        """End all: what was asked over the lost link is answered over no other."""
        for subject in list(self._waiting):
            self._end(subject, ConnectionReconnectingError())

    def find_link(self) -> None:
        """Tell who asked without waiting."""
        for callback in self.linked:
            callback()

    def _end(self, subject: str, error: Exception) -> None:
        for task in self._waiting.pop(subject, ()):
            self._ended[task] = error
            task.cancel()

    @contextmanager
    def answer_to(self, subject: str) -> Iterator[None]:
        """For as long as the block waits for what comes of this.

        Raises Denied when it is refused, ConnectionReconnectingError when the link is lost. Whoever is cancelled in the
        block is cancelled after it: `wait_for` of Python 3.11, which nats-py waits with, swallows a cancellation that
        comes with the answer, and who was cancelled once would go on for ever.
        """
        task = asyncio.current_task()
        assert task is not None
        cancelled = task.cancelling()
        waiting = self._waiting.setdefault(subject.lower(), [])
        waiting.append(task)
        try:
            yield
        finally:
            if task in waiting:
                waiting.remove(task)
            if not waiting:
                self._waiting.pop(subject.lower(), None)
            error = self._ended.pop(task, None)
            if error is not None and task.uncancel() == cancelled:
                raise error from None
            if task.cancelling() > cancelled:
                raise asyncio.CancelledError
