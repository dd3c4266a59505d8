"""The reward `math`: 1 if the final answer is mathematically equal to the expected one (math-verify), else 0.

Private part: `{"answer": …}`, LaTeX or plain. The library runs in a sandbox, because text of the policy can make it
compute for ever (`9**9**9`); that is a wrong answer, not a failure.
"""

import json
from typing import ClassVar

from rewards.answer import finished_answer, tagged_answer
from rewards.errors import BadTask, RewardError
from rewards.reward import Reward, Run
from schemas.task import TaskRow
from schemas.trajectory import Trajectory

_NOT_INSTALLED = 3
_EXPECTED_READ = b"expected answer read\n"
"""Printed before the policy's text is touched: whatever goes wrong later is the policy's fault."""

# the library's own time-outs use SIGALRM; the sandbox's limits are the ones that count
_VERIFY = """
import json, logging, sys
logging.disable()
try:
    from math_verify import parse, verify
except ImportError as error:
    print(error)
    sys.exit(3)
texts = json.load(sys.stdin)
expected = parse(texts["expected"], parsing_timeout=None)
if not expected:
    sys.exit("math-verify cannot read the expected answer")
print("expected answer read", flush=True)
given = parse(texts["given"], parsing_timeout=None)
correct = bool(given) and verify(expected, given, timeout_seconds=None)
print(json.dumps({"answered": bool(given), "correct": correct}))
"""


class MathReward:
    """See the module."""

    imports: ClassVar[tuple[str, ...]] = ("math_verify",)

    async def __call__(self, task: TaskRow, trajectory: Trajectory, run: Run) -> Reward:
        """Score what `finish` was called with, or the last turn's text, or what its last `<answer>…</answer>` holds."""
        if "answer" not in task.private:
            raise BadTask("no_answer", f"the private part of {task.id} has no `answer`")
        text = trajectory.turn_text
        tagged = finished_answer(trajectory)
        if tagged is None:
            tagged = tagged_answer(text)
        texts = {
            "expected": _as_latex(str(task.private["answer"])),
            "given": text if tagged is None else _as_latex(tagged),
        }
        ran = await run(_VERIFY, stdin=json.dumps(texts).encode())
        if ran.exit_code == _NOT_INSTALLED:
            raise RewardError("not_installed", "math-verify: `make setup` installs it")
        before, marker, verdict = ran.output.partition(_EXPECTED_READ)
        if not marker:
            raise BadTask(
                "bad_answer", f"{task.id}: {before.decode(errors='replace') or ran.reason}"
            )
        if ran.reason != "exit" or ran.exit_code != 0:
            return Reward(value=0.0, parts={"answered": 0.0, "unreadable": 1.0})
        found = json.loads(verdict.splitlines()[-1])
        parts = {"answered": float(found["answered"]), "unreadable": 0.0}
        return Reward(value=float(found["correct"]), parts=parts)


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"


math = MathReward()
