"""What can go wrong with tools. None of these is the policy's fault.

ToolError            a tool's own machinery failed
├── SandboxError     a sandbox could not run a call
│   └── NoSandbox    no allowed tier passes its self-test here
└── UnknownTool      a recipe names a tool that is not there
"""

from schemas.events import Boundary


class ToolError(Exception):
    """A tool failed, not the policy's call. `boundary` and `code` are short stable names."""

    boundary: Boundary = "tool"

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{self.boundary}.{code}: {detail}")
        self.code = code
        self.detail = detail


class SandboxError(ToolError):
    """A sandbox could not run a call."""

    boundary: Boundary = "sandbox"


class NoSandbox(SandboxError):
    """No allowed tier passes its self-test on this machine."""


class UnknownTool(ToolError):
    """A recipe names a tool that is not there."""
