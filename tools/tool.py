"""What a tool is: a name, a schema for the policy, and an async function."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from tools.sandbox.sandbox import Limits, Outcome

Run = Callable[..., Awaitable[Outcome]]
"""`await run(code, stdin=…, limits=…)`: Python code in a fresh sandbox; see Sandbox.run."""


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool is given beside the policy's arguments."""

    run: Run
    limits: Limits
    task: dict[str, Any]
    """The task row's `public.extra`."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy will see."""

    text: str
    ok: bool = True
    """False for an error of the policy's own making: still an observation."""


class Tool(Protocol):
    """One tool."""

    name: str
    description: str
    parameters: dict[str, Any]
    """A JSON schema of the arguments, made from the function's signature."""
    argument: str
    """The argument that a tagged call's body fills."""

    async def __call__(self, context: Context, arguments: dict[str, Any]) -> Observation:
        """Run one call.

        Wrong arguments or failing code are observations with `ok=False`. Raises ToolError or SandboxError
        only when infrastructure fails.
        """
        ...
