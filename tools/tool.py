"""What a tool is: functions that the policy may call, what the recipe may say of them, and an async call.

Most tools are one typed async function; see tools/function.py. What bridges to something with functions of its own
(an MCP server) implements `Tool` itself.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from schemas.events import Call
from tools.sandbox.sandbox import Limits, Outcome, Session

Run = Callable[..., Awaitable[Outcome]]
"""`await run(code, stdin=…, limits=…)`: Python code in a fresh sandbox; see Sandbox.run."""

OpenSession = Callable[..., Awaitable[Session]]
"""`await session("bash")`: the session that this tool keeps for the trajectory, or a new one when that has ended.
`Limits` may follow: those of a new one."""


class Closes(Protocol):
    """What a tool keeps for a trajectory beside sandbox sessions."""

    async def close(self) -> None:
        """Free it. Safe to call twice."""
        ...


KeepOpen = Callable[[str, Callable[[], Closes]], Any]
"""`keep("name", make)`: what `make` has made for this trajectory, once; closed with the trajectory's session."""

Keep = Literal["head", "tail", "both"]
"""Which side of an observation stays when it is too long."""

Effects = Literal["none", "external"]
"""`external`: a call changes the world outside its sandbox and must never run twice."""


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A picture as it is stored."""

    data: bytes
    media_type: str
    """`image/png`, …"""


LoadImage = Callable[[], Awaitable[Image]]
"""`await load()`: the image."""


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool is given beside the policy's arguments."""

    run: Run
    limits: Limits
    task: dict[str, Any]
    """The task row's `public.extra`."""
    session: OpenSession | None = None
    """For a tool with `session = True`; so is `keep`."""
    keep: KeepOpen | None = None
    images: list[LoadImage] = []
    """Those of the task's messages and of earlier observations, in order, each to be loaded."""
    options: Any = None
    """The tool's own options from the recipe; set by the tool before its function runs."""
    opened: Any = None
    """What the tool opened when its process began (an index, connections); set as `options` is."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy will see."""

    text: str
    ok: bool = True
    """False for an error of the policy's own making: still an observation."""
    images: list[Image] = []
    """One for each PLACEHOLDER in the text, in order; those beyond the placeholders come after the text."""
    handed_in: bytes = b""
    """For the reward, not for the policy."""
    last: bool = False
    """The trajectory ends with it; the policy does not see it."""


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that the policy may call, as it is described to it."""

    name: str
    description: str
    parameters: dict[str, Any]
    """A JSON schema of the arguments, an object."""
    argument: str = ""
    """The argument that a body without names fills (`<python>…</python>`); empty: such a body is a JSON object."""

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates take it."""
        described = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": described}


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a recipe may say of any tool in `[tools.options.<tool>]`; a tool's own options are added by a subclass."""

    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    """Wall clock of one call; else `tools.timeout_s`."""
    observation_chars: Annotated[int, Meta(ge=1)] | None = None
    """A longer result is cut; else `tools.observation_chars`."""
    keep: Keep | None = None
    """Which side of it stays; else the tool's own."""
    imports: list[str] | None = None
    """Modules that its Python code finds already imported (tier `ns`); else `toolbox.imports`."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tool is opened."""

    recipe_dir: str = ""
    """What relative paths of options begin at."""
    encoder: Callable[[str], Callable[[list[str]], Any]] | None = None
    """Opens a text encoder by its folder or hub name: texts → float32[texts, width], rows of length 1. torch is loaded
    only when it is called; None where there is none."""


class Tool(Protocol):
    """One tool. Subclass it for the defaults."""

    name: str
    """As in `tools.use`, in subjects and in the log."""
    functions: tuple[Function, ...]
    """What the policy may call. Most tools have one, of their own name."""
    options: Options
    session: bool = False
    """Calls of one trajectory share a state that one replica keeps."""
    replay: bool = True
    """A session that is lost may be made anew by running its calls again; else the trajectory fails."""
    effects: Effects = "none"
    ends: bool = False
    """A turn that calls it is the trajectory's last; the call itself is the answer and is not run."""
    keep: Keep = "both"

    def configured(self, options: dict[str, Any]) -> "Tool":
        """The tool with a recipe's options. Raises ToolError for those that it does not have."""
        ...

    async def resolve(self, place: Place) -> dict[str, Any]:
        """Options to add for the whole run: what is to be asked once, when it begins. Raises ToolError."""
        del place
        return {}

    def open(self, place: Place) -> AbstractAsyncContextManager[None]:
        """Around all calls of a process. Raises ToolError if what the tool needs is not there."""
        ...

    def check(self, call: Call) -> str:
        """What is wrong with the call's arguments, for the policy; empty when nothing is."""
        ...

    async def __call__(self, context: Context, arguments: dict[str, Any]) -> Observation:
        """Run one call.

        Wrong arguments or failing code are observations with `ok=False`. Raises ToolError or SandboxError
        only when infrastructure fails.
        """
        ...
