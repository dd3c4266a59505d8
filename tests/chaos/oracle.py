"""A scripted policy on the arithmetic of recipes/: calls the tool, and copies the result right three times in four."""

import random
import re

_TASK = re.compile(r"<\|user\|>What is (.*?)\?<\|end\|>")
_RESULT = re.compile(r"<\|tool\|>(.*?)<\|end\|>")


class Script:
    """See engines/scripted.py."""

    seconds_per_token = 0.01

    def __call__(self, text: str, seed: int) -> str:
        """The call, and then the result or a number that it is not."""
        if result := _RESULT.search(text):
            return result[1] if random.Random(seed).random() < 0.75 else "1"
        task = _TASK.search(text)
        assert task is not None, "a trajectory begins with its task"
        return f"<python>{task[1]}</python>"


script = Script()
