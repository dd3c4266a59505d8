"""A task for the tool `repo`, and a script that does it: `actors train examples/calculator.toml`.

The repository is the bundle beside this file: `git clone examples/calculator.bundle`.
"""

import itertools
import json
from collections.abc import Iterator

from schemas.task import ChatMessage, PublicPart, TaskRow

COMMIT = "fdf31b1aa542fdf2c1627bdf3c8a737b24cf4606"
HIDDEN = """from calculator import mean


def test_mean_of_nothing():
    assert mean([]) == 0
"""
RIGHT, WRONG = "sum(numbers) / max(1, len(numbers))", "sum(numbers) / (len(numbers) or 0)"


def rows(_seed: int) -> Iterator[TaskRow]:
    """The same task again and again."""
    for number in itertools.count():
        content = "mean([]) should be 0. Mend it in calculator.py and submit."
        yield TaskRow(
            id=f"mean-{number}",
            public=PublicPart(
                messages=[ChatMessage(role="user", content=content)],
                extra={"repo": "calculator.bundle", "commit": COMMIT},
            ),
            private={
                "files": {"tests/test_nothing.py": HIDDEN},
                "fail_to_pass": ["tests/test_nothing.py::test_mean_of_nothing"],
                "pass_to_pass": ["tests/test_calculator.py::test_mean"],
                "command": "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest --junitxml=$REPORT",
            },
        )


def script(text: str, seed: int) -> str:
    """Look, edit, try, submit; every second time the edit is wrong."""
    change = {
        "path": "calculator.py",
        "old": "sum(numbers) / len(numbers)",
        "new": RIGHT if seed % 2 else WRONG,
    }
    calls = [
        ("view", {"path": "calculator.py"}),
        ("edit", change),
        ("run", {"command": "python3 -c 'import calculator; print(calculator.mean([]))'"}),
        ("submit", {}),
    ]
    name, arguments = calls[text.count("<|tool|>")]
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
