"""What can go wrong in an engine.

EngineError   the engine failed
└── TooLong   the prompt does not fit the model's context
ChatError     the model's chat template cannot say what it is asked to
"""


class EngineError(Exception):
    """The engine failed, not the policy. `code` is a short stable name."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"engine.{code}: {detail}")
        self.code = code
        self.detail = detail


class TooLong(EngineError):
    """The request needs more positions than the model has."""

    def __init__(self, need: int, have: int) -> None:
        super().__init__("too_long", f"{need} positions needed, the model has {have}")


class ChatError(Exception):
    """The model's chat template cannot say this; the message tells what to change."""
