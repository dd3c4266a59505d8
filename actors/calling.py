"""Which tools a policy may call while a run goes on: the recipe's, then what was added, replaced and removed since.

    recipe           python, sql
    tooladded        sql@5f0c9a1e      new calls are of this version; those in the log are finished by the recipe's
    toolremoved      sql               the policy is told so when it calls it

`Toolset` folds the run's events; `Calling` is what it comes to at one moment.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import structlog
from msgspec.structs import replace

from bus import subjects
from bus.log import Log
from schemas.events import AnyEvent, ToolAdded, ToolRemoved
from tools.errors import ToolError
from tools.formats import CallFormat, Parsed
from tools.remote import ShownTool
from tools.tool import Tool

log = structlog.get_logger()

_POLL_S = 5.0

OpenFormat = Callable[[Mapping[str, Tool]], CallFormat]
"""The recipe's call format for some tools. Raises ToolError when two have the same tag."""


class Calling:
    """How a policy calls tools."""

    def __init__(
        self,
        call_format: CallFormat,
        versions: Mapping[str, str] | None = None,
        removed: frozenset[str] = frozenset(),
    ) -> None:
        """`call_format` knows the tools removed too: a call of one is to be told from other text."""
        self._format = call_format
        self._versions = versions or {}
        self._removed = removed

    def granting(self, names: Sequence[str] | None) -> CallFormat:
        """What reads the turns of a task that is granted these tools; None grants all."""
        return self._format.granting(names)

    def shown(self, names: Sequence[str] | None) -> CallFormat:
        """What such a task is shown."""
        known = self._format.functions.tools if names is None else names
        left = [name for name in known if name not in self._removed]
        return self._format.granting(left if self._removed else names)

    def parse(self, text: str, names: Sequence[str] | None) -> Parsed:
        """The calls of a turn, each with its tool's version; a call of a tool that was removed becomes feedback."""
        parsed = self.granting(names).parse(text)
        gone = {call.tool: None for call in parsed.calls if call.tool in self._removed}
        told = [f"{name} was removed: it can no longer be called." for name in gone]
        calls = [
            replace(call, version=self._versions.get(call.tool, ""))
            for call in parsed.calls
            if call.tool not in gone
        ]
        feedback = " ".join(filter(None, (parsed.feedback, *told)))
        return replace(parsed, calls=calls, feedback=feedback)


class Toolset:
    """Folds a run's events into the tools that there are."""

    def __init__(self, tools: Mapping[str, Tool], open_format: OpenFormat) -> None:
        """`tools`: the recipe's. Raises ToolError for a format that they do not fit."""
        self._open_format = open_format
        self._tools = dict(tools)
        self._versions: dict[str, str] = {}
        self._removed: frozenset[str] = frozenset()
        self.calling = Calling(open_format(tools))

    @property
    def present(self) -> dict[str, str]:
        """The tools that may be called, each with its version."""
        left = (name for name in self._tools if name not in self._removed)
        return {name: self._versions.get(name, "") for name in left}

    def ends(self, name: str) -> bool:
        """Whether a call of the tool ends the trajectory."""
        return self._tools[name].ends

    def observe(self, event: AnyEvent | None) -> None:
        """Take one event in. Raises ToolError for a tool that does not fit; it is not added then."""
        if isinstance(event, ToolAdded):
            tools = self._tools | {event.tool: ShownTool(event.tool, event.functions)}
            call_format = self._open_format(tools)
            self._tools = tools
            self._versions = self._versions | {event.tool: event.version}
            self._removed -= {event.tool}
        elif isinstance(event, ToolRemoved):
            call_format = self._open_format(self._tools)
            self._removed |= {event.tool}
        else:
            return
        self.calling = Calling(call_format, self._versions, self._removed)

    async def catch_up(self, events: AsyncIterator[AnyEvent | None]) -> None:
        """Take in what has happened until now."""
        async for event in events:
            if event is None:
                return
            self.take(event)

    def take(self, event: AnyEvent | None) -> None:
        """`observe`, for those who must go on: what does not fit is said and left out."""
        try:
            self.observe(event)
        except ToolError as error:
            log.error("tool not added", error=str(error))


async def run_events(run_log: Log) -> AsyncIterator[AnyEvent | None]:
    """What happens to the run itself, from its beginning; None whenever that was all until now."""
    subject = subjects.run_event(run_log.run)
    async for found in run_log.follow(subject=subject, poll_s=_POLL_S, hint=subject):
        for stored in found:
            yield stored.event
        if not found:
            yield None
