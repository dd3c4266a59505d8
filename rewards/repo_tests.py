"""The rewards `repo_tests` and `repo_tests_share`: whether the patch that `submit` handed in makes the tests pass.

Private part of the row:

    {"fail_to_pass": ["tests/test_a.py::test_new"],     what the task is about
     "pass_to_pass": ["tests/test_a.py::test_old"],     what must not break
     "files": {"tests/test_a.py": "…"},                 the hidden tests; written over whatever is there
     "command": "…",                                    writes a JUnit report to $REPORT; by default pytest
     "timeout_s": 60}                                   of the whole trial; more is the patch's fault

`deadlines.score_s` of the recipe should be longer than a trial.

`repo_tests` is 1 when all of them pass, else 0; `repo_tests_share` is the share of the first times the share of the
second. Nothing submitted is 0.

The trial is in a fresh work tree of the task's commit, in the scorer's own sandbox. What the patch does to the test
files, and to files by which pytest is configured in code, is left out. A test counts when a report says that it passed,
so code that ends the process gains nothing. The code under test runs beside its tests, as in any test run: code that
patches the runner in memory, or forges the report, is not found out.
"""

import inspect
import re
from typing import Annotated

import msgspec
from msgspec import Meta

from rewards import trial
from rewards.errors import BadTask, RewardError
from rewards.reward import Reward, Run
from schemas.task import TaskRow
from schemas.trajectory import Trajectory

_TRIAL = f"{inspect.getsource(trial)}\ntry_patch()\n"
_OF_PYTEST = ("conftest.py", "pytest.ini", ".pytest.ini", "tox.ini")


class Tests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The private part of a row; see the module."""

    fail_to_pass: Annotated[list[str], Meta(min_length=1)]
    pass_to_pass: list[str] = []
    files: dict[str, str] = {}
    command: str = ""
    timeout_s: Annotated[float, Meta(gt=0)] = 60.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What trial.py is to do."""

    fail_to_pass: list[str]
    pass_to_pass: list[str]
    files: dict[str, str]
    command: str
    modules: list[str]
    """For pytest: the files that the tests are in."""
    kept: list[str]
    """Patterns of paths, for git, that the patch must not change."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What trial.py found."""

    applied: bool
    fail_to_pass: Annotated[int, Meta(ge=0)]
    pass_to_pass: Annotated[int, Meta(ge=0)]
    """How many passed."""


class RepoTests:
    """See the module."""

    def __init__(self, *, share: bool) -> None:
        self._share = share

    async def __call__(self, task: TaskRow, trajectory: Trajectory, run: Run) -> Reward:
        """Score what was submitted. Raises BadTask, and RewardError where the tests cannot run."""
        try:
            tests = msgspec.convert(task.private, Tests)
        except msgspec.ValidationError as error:
            raise BadTask("bad_tests", f"the private part of {task.id}: {error}") from error
        request = _request(task.id, tests)
        patch = submitted(trajectory)
        if not patch:
            return Reward(value=0.0, parts=_parts(tests, None, submitted=patch is not None))
        stdin = msgspec.json.encode(request) + b"\n" + patch
        ran = await run(_TRIAL, stdin=stdin, wall_s=tests.timeout_s, repository=True)
        if ran.exit_code == trial.NO_PYTEST:
            raise RewardError("not_installed", "pytest, in the scorer's sandbox")
        verdict = _verdict(ran.output) if ran.reason == "exit" else None
        parts = _parts(tests, verdict, submitted=True)
        value = parts["fail_to_pass"] * parts["pass_to_pass"]
        return Reward(value=value if self._share else float(value == 1.0), parts=parts)


repo_tests = RepoTests(share=False)
repo_tests_share = RepoTests(share=True)


def submitted(trajectory: Trajectory) -> bytes | None:
    """The patch that ended the trajectory; None when it ended otherwise."""
    last = trajectory.results[-1] if trajectory.results else None
    return last.handed_in if last and last.last else None


def _request(task: str, tests: Tests) -> Request:
    for path in tests.files:
        if path.startswith("/") or not {"", ".", "..", ".git"}.isdisjoint(path.split("/")):
            raise BadTask("bad_tests", f"the private part of {task}: no file can be {path!r}")
    names = [*tests.fail_to_pass, *tests.pass_to_pass]
    modules = sorted({name.partition("::")[0] for name in names})
    return Request(
        fail_to_pass=tests.fail_to_pass,
        pass_to_pass=tests.pass_to_pass,
        files=tests.files,
        command=tests.command,
        modules=modules,
        kept=[
            *(re.sub(r"([*?\[\]\\])", r"\\\1", path) for path in (*tests.files, *modules)),
            *(pattern for name in _OF_PYTEST for pattern in (name, f"*/{name}")),
        ],
    )


def _verdict(output: bytes) -> Verdict | None:
    """What the last line says; None when the trial did not come to its end."""
    try:
        return msgspec.json.decode(output.splitlines()[-1], type=Verdict)
    except (IndexError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # code of the patch may have written there


def _parts(tests: Tests, verdict: Verdict | None, *, submitted: bool) -> dict[str, float]:
    fixed = verdict.fail_to_pass / len(tests.fail_to_pass) if verdict else 0.0
    held = verdict.pass_to_pass / max(1, len(tests.pass_to_pass)) if verdict else 0.0
    return {
        "submitted": float(submitted),
        "applied": float(verdict is not None and verdict.applied),
        "fail_to_pass": min(fixed, 1.0),
        "pass_to_pass": min(held, 1.0) if tests.pass_to_pass else 1.0,
    }
