"""What can go wrong in the learner.

LearnerError
├── UnsupportedModel   packing would not give the log-probabilities that the model itself gives
├── NotFinite          a step's loss or gradient is infinite or not a number; nothing was updated
├── BadConversation    a demonstration that the chat template cannot shape
└── BadCheckpoint      a checkpoint that is damaged, or another model's
"""

from pathlib import Path


class LearnerError(Exception):
    """The base; the message is a sentence for people."""


class UnsupportedModel(LearnerError):
    """The model cannot be trained by this learner."""

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"{model} cannot be trained here: {why}")
        self.model = model
        self.why = why


class NotFinite(LearnerError):
    """A step was given up before it changed anything."""

    def __init__(self, step: int, quantity: str, value: float) -> None:
        super().__init__(f"step {step}: {quantity} is {value}; nothing was updated")
        self.step = step
        self.quantity = quantity
        self.value = value


class BadConversation(LearnerError):
    """A demonstration cannot be made into tokens."""


class BadCheckpoint(LearnerError):
    """A checkpoint cannot be loaded; the policy is as it was."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"checkpoint {path}: {why}")
        self.path = path
        self.why = why
