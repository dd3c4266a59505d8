"""The `repo` tool: software engineering. The policy works on a repository at a commit and submits what it changed.

`public.extra` of the task has `repo` and `commit`; see repositories.py. The work tree is in a sandbox that lives as
long as the trajectory's session; its `.git` knows this one commit. `submit` ends the trajectory: the patch from the
commit to the work tree goes with its result, for the reward (`repo_tests`) and not for the policy. Where nothing is
submitted, nothing is handed in. In the last turn that `policy.max_turns` allows no call is run, `submit` neither.
"""

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

import msgspec
from msgspec.structs import replace

from schemas.events import Call
from tools.bash import with_exit_code
from tools.errors import ToolError
from tools.function import FunctionTool
from tools.outcome import observe, session_of
from tools.repositories import RepoOptions, Repositories, require_git
from tools.sandbox.sandbox import Limits, Outcome, Session
from tools.tool import Context, Observation, Place, Tool

PATCH_BYTES = 256 << 10
"""A larger patch cannot be submitted: it would be in the log, and in the messages of its trajectory."""
_GIT_S = 120.0
"""For what git does between the policy's own actions, whatever its limits."""


class Repo(Tool):
    """One tool with a function for each action."""

    name = "repo"
    session = True

    def __init__(self, options: RepoOptions | None = None) -> None:
        self.options: RepoOptions = options or RepoOptions()
        actions = (self.view, self.edit, self.create, self.run, self.submit)
        self._actions = {action.__name__: FunctionTool(action) for action in actions}
        self.functions = tuple(action.functions[0] for action in self._actions.values())
        self._repositories: Repositories | None = None
        self._checked_out: WeakSet[Session] = WeakSet()

    def configured(self, options: dict[str, Any]) -> "Repo":
        """See Tool."""
        try:
            return Repo(msgspec.convert(options, RepoOptions))
        except msgspec.ValidationError as error:
            raise ToolError("bad_options", f"tools.options.repo: {error}") from error

    async def resolve(self, place: Place) -> dict[str, Any]:
        """See Tool. Nothing is asked; what is missing is said."""
        require_git()
        return await super().resolve(place)

    @asynccontextmanager
    async def open(self, place: Place) -> AsyncIterator[None]:
        """See Tool."""
        require_git()
        with self.repositories(place.recipe_dir) as self._repositories:
            yield
        self._repositories = None

    @contextmanager
    def repositories(self, recipe_dir: str) -> Iterator[Repositories]:
        """What the options say, around all calls, or rewards, of a process."""
        root = Path(recipe_dir, self.options.root)
        with TemporaryDirectory(prefix="actors-repositories-") as temporary:
            cache = Path(recipe_dir, self.options.cache) if self.options.cache else Path(temporary)
            yield Repositories(self.options, root, cache)

    def check(self, call: Call) -> str:
        """See Tool."""
        found = self._find(call.arguments)
        if isinstance(found, str):
            return found
        action, arguments = found
        return action.check(Call(tool=self.name, arguments=arguments))

    async def __call__(self, context: Context, arguments: dict[str, Any]) -> Observation:
        """See Tool. `arguments`: `function` and its `arguments`."""
        found = self._find(arguments)
        if isinstance(found, str):
            return Observation(text=found, ok=False)
        action, given = found
        return await action(context, given)

    def _find(self, arguments: dict[str, Any]) -> tuple[FunctionTool, dict[str, Any]] | str:
        action = self._actions.get(str(arguments.get("function")))
        given = arguments.get("arguments")
        if action is None or not isinstance(given, dict):
            return f"There is no such action of {self.name}; there are: {', '.join(self._actions)}."
        return action, given

    # -- what the policy sees ------------------------------------------------------------------------------

    async def view(
        self, context: Context, path: str = ".", start: int = 1, end: int = 0
    ) -> Observation:
        """Show a file with line numbers, or what is in a folder.

        Args:
            path: The file or folder; relative paths begin at the repository's root.
            start: The first line to show.
            end: The last line to show; 200 lines are shown if it is left out.
        """
        return await self._show(context, "view", path=path, start=start, end=end)

    async def edit(self, context: Context, path: str, old: str, new: str) -> Observation:
        """Replace a text in a file and show the place.

        Args:
            path: The file.
            old: The text to replace; it must occur exactly once, character by character, indentation included.
            new: The text in its place.
        """
        return await self._show(context, "edit", path=path, old=old, new=new)

    async def create(self, context: Context, path: str, content: str) -> Observation:
        """Create a file; its folders are made.

        Args:
            path: The file, which must not exist.
            content: All of its text.
        """
        return await self._show(context, "create", path=path, content=content)

    async def run(self, context: Context, command: str) -> Observation:
        """Run a command, or a whole script, in a new bash shell at the repository's root and return what it prints.

        Files stay, and background jobs; directory and variables do not. There is no network and no input.

        Args:
            command: The command; it may have many lines.
        """
        limits = _limits(context)
        outcome = await self._act(context, limits, "run", {"command": command})
        return with_exit_code(observe(outcome, limits), outcome)

    async def submit(self, context: Context) -> Observation:
        """Hand in all changes to the repository's files. This ends the task: nothing can be added afterwards."""
        commit = await self._open().commit(context.task)
        limits = replace(context.limits, wall_s=_GIT_S, cpu_s=int(_GIT_S))
        arguments = {"commit": commit.id, "limit_bytes": PATCH_BYTES}
        outcome = await self._act(context, limits, "hand_in", arguments, commit.pack)
        if outcome.reason != "exit" or outcome.exit_code != 0:
            return observe(outcome, limits)
        size = len(outcome.output)
        return Observation(
            text=f"Submitted: a patch of {size} bytes.", handed_in=outcome.output, last=True
        )

    # -- in the session ------------------------------------------------------------------------------------

    async def _show(self, context: Context, action: str, **arguments: object) -> Observation:
        limits = _limits(context)
        return observe(await self._act(context, limits, action, arguments), limits)

    async def _act(
        self,
        context: Context,
        limits: Limits,
        action: str,
        arguments: dict[str, Any],
        stdin: bytes = b"",
    ) -> Outcome:
        session = await self._session(context)
        request = msgspec.json.encode({"action": action, "arguments": arguments})
        return await session.run("act()", stdin=request + b"\n" + stdin, limits=limits)

    async def _session(self, context: Context) -> Session:
        """The trajectory's session, in its work tree."""
        repositories = self._open()
        limits = repositories.with_room(context.limits)
        session = await session_of(context, "python", limits)
        if session not in self._checked_out:
            patient = replace(limits, wall_s=_GIT_S, cpu_s=int(_GIT_S))
            await repositories.run(session.run, context.task, "", b"", patient)
            self._checked_out.add(session)
        return session

    def _open(self) -> Repositories:
        assert self._repositories is not None, "calls are within `open`"
        return self._repositories


def _limits(context: Context) -> Limits:
    """Of an action: as much processor time as wall clock."""
    return replace(context.limits, cpu_s=math.ceil(context.limits.wall_s))


repo = Repo()
