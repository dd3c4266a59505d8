"""The rewards `repo_tests` and `repo_tests_share`: patches, right and hostile, tried as a scorer tries them."""

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from actors.actor import HopFailed
from actors.scorer import Scorer
from rewards.registry import load_reward
from rewards.trial import canonical
from schemas.events import Admitted, Result
from schemas.task import PublicPart
from schemas.trajectory import Trajectory
from tools.repo import Repo
from tools.sandbox.ns import NamespaceSandbox

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILES = {
    "calc.py": "def add(a, b):\n    return a - b\n\n\ndef double(a):\n    return 2 * a\n",
    "tests/test_calc.py": "from calc import double\n\n\ndef test_double():\n    assert double(2) == 4\n",
}
HIDDEN = """import pytest
from calc import add


@pytest.mark.parametrize("n", [1, 2])
def test_add(n):
    assert add(n, n) == 2 * n


def test_zero():
    assert add(1, 0) == 1
"""
TESTS = {
    "fail_to_pass": ["tests/test_add.py::test_add[1]", "tests/test_add.py::test_add[2]"],
    "pass_to_pass": ["tests/test_calc.py::test_double", "tests/test_add.py::test_zero"],
    "files": {"tests/test_add.py": HIDDEN},
    "command": "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest -q --junitxml=$REPORT",
}
FIX = {"calc.py": FILES["calc.py"].replace("a - b", "a + b")}


def git(folder: Path, *arguments: str) -> bytes:
    names = {
        f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, env=os.environ | names, capture_output=True, check=True).stdout


def write(folder: Path, files: dict[str, str | None]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.unlink()
        else:
            path.write_text(text)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repositories") / "project"
    folder.mkdir()
    write(folder, dict(FILES))
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=base")
    return folder


def patch(project: Path, files: dict[str, str | None]) -> bytes:
    """From the commit to the commit with these files."""
    try:
        write(project, files)
        git(project, "add", "--all")
        return git(project, "diff", "--cached", "--binary")
    finally:
        git(project, "reset", "--quiet", "--hard")


class Trials:
    """Scores patches with a scorer's own sandbox."""

    def __init__(self, project: Path, sandbox: NamespaceSandbox, repositories: Any) -> None:
        self._commit = git(project, "rev-parse", "HEAD").decode().strip()
        self._sandbox = sandbox
        self._repositories = repositories

    async def score(
        self, handed_in: bytes | None, reward: str = "repo_tests", **private: Any
    ) -> tuple[float, dict[str, float]]:
        async def load_private(_: str) -> dict[str, Any]:
            return TESTS | private

        public = PublicPart(messages=[], extra={"repo": "project", "commit": self._commit})
        admitted = Admitted(trajectory="g-0-0", task="t", public=public, private_key="k")
        result = Result(
            trajectory="g-0-0",
            turn=0,
            call=0,
            text="",
            handed_in=handed_in or b"",
            last=handed_in is not None,
        )
        state = Trajectory(admitted=admitted, results=[result])
        scorer = Scorer(
            load_reward(reward), load_private, self._sandbox, "scorer", self._repositories
        )
        scored = await scorer.handle(state)
        return scored.reward, scored.parts


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trials(project: Path) -> AsyncIterator[Trials]:
    sandbox = NamespaceSandbox()
    with Repo().configured({"root": ".."}).repositories(str(project)) as repositories:
        yield Trials(project, sandbox, repositories)
    await sandbox.close()


def parts(
    fixed: float, held: float, *, submitted: float = 1, applied: float = 1
) -> dict[str, float]:
    return {
        "submitted": submitted,
        "applied": applied,
        "fail_to_pass": fixed,
        "pass_to_pass": held,
    }


async def test_the_fix_scores(trials: Trials, project: Path) -> None:
    """By the runner of the row, and by the one that is used where it names none."""
    for reward, private in (("repo_tests", {}), ("repo_tests_share", {"command": ""})):
        scored = await trials.score(patch(project, FIX), reward, **private)
        assert scored == (1.0, parts(1, 1))


async def test_what_is_not_handed_in_scores_nothing(trials: Trials) -> None:
    assert await trials.score(None) == (0.0, parts(0, 0, submitted=0, applied=0))
    assert await trials.score(b"") == (0.0, parts(0, 0, applied=0))


async def test_half_a_fix_is_a_share(trials: Trials, project: Path) -> None:
    """Of what was to be mended, times what still holds."""
    half = FIX["calc.py"].replace("a + b", "2 if (a, b) == (1, 1) else a - b")
    half = half.replace("2 * a", "3 * a")
    found = parts(0.5, 0.5)
    assert await trials.score(patch(project, {"calc.py": half})) == (0.0, found)
    assert await trials.score(patch(project, {"calc.py": half}), "repo_tests_share") == (
        0.25,
        found,
    )


ENDS = FIX["calc.py"].replace("a + b", "__import__('os')._exit(0)")
PASSES = """import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    outcome.get_result().outcome = "passed"
"""
HOSTILE: dict[str, dict[str, str | None]] = {
    "tests that say yes": {
        "tests/test_add.py": "import pytest\n@pytest.mark.parametrize('n', [1, 2])\ndef test_add(n): pass\n",
        "tests/test_calc.py": "def test_double(): pass\n",
    },
    "a hook that passes all": {"conftest.py": PASSES, "tests/conftest.py": PASSES},
    "a module in the place of the runner": {"pytest.py": "raise SystemExit(0)\n"},
    "a customised start": {"sitecustomize.py": "import os; os._exit(0)\n"},
    "an end in the middle": {"calc.py": ENDS},
    "an exit while it is imported": {"calc.py": "import os\nos._exit(0)\n"},
    "a verdict of its own": {
        "calc.py": 'print(\'{"applied": true, "fail_to_pass": 9, "pass_to_pass": 9}\')\n' + ENDS
    },
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE.keys())
async def test_cheating_does_not_help(
    trials: Trials, project: Path, changes: dict[str, str | None]
) -> None:
    """The tests that count are the hidden ones, run by the runner that is there, and each must be seen to pass."""
    reward, found = await trials.score(patch(project, changes), "repo_tests_share")
    assert reward == 0.0
    assert found["fail_to_pass"] == 0.0


async def test_a_fix_counts_whatever_comes_with_it(trials: Trials, project: Path) -> None:
    """Changed, deleted and shadowed tests are as they were."""
    changes = FIX | HOSTILE["tests that say yes"] | HOSTILE["a hook that passes all"]
    changes["tests/test_calc.py"] = None
    assert await trials.score(patch(project, changes)) == (1.0, parts(1, 1))


@pytest.mark.parametrize(
    "bad", [b"no patch", b"--- a/calc.py\n+++ b/../../etc/x\n@@ -1 +1 @@\n-def add(a, b):\n+x\n"]
)
async def test_a_patch_that_does_not_apply(trials: Trials, bad: bytes) -> None:
    assert await trials.score(bad) == (0.0, parts(0, 0, applied=0))


async def test_code_that_never_ends_is_the_patch_s_fault(trials: Trials, project: Path) -> None:
    """The time is the row's."""
    endless = {"calc.py": "while True:\n    pass\n"}
    reward, found = await trials.score(patch(project, endless), timeout_s=10.0)
    assert (reward, found["applied"]) == (0.0, 0.0)


async def test_any_runner_that_writes_a_report(trials: Trials, project: Path) -> None:
    """`$REPORT` is where; names are as there."""
    command = """python3 - <<'END'
import os, calc
ok = calc.add(1, 1) == 2
case = '<testcase classname="sums" name="add">' + ("" if ok else "<failure/>") + "</testcase>"
open(os.environ["REPORT"], "w").write(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
END"""
    private = {"fail_to_pass": ["sums::add"], "pass_to_pass": [], "command": command, "files": {}}
    assert (await trials.score(patch(project, FIX), **private))[0] == 1.0
    other = {"calc.py": FILES["calc.py"] + "\n"}
    assert (await trials.score(patch(project, other), **private))[0] == 0.0


@pytest.mark.parametrize(
    ("private", "says"),
    [
        ({"fail_to_pass": []}, "length >= 1"),
        ({"answer": 1}, "unknown field `answer`"),
        ({"files": {"../x": ""}}, "no file can be '../x'"),
        ({"files": {"/x": ""}}, "no file can be '/x'"),
        ({"files": {".git/config": ""}}, "no file can be"),
    ],
)
async def test_a_broken_row_is_no_reward(
    trials: Trials, private: dict[str, Any], says: str
) -> None:
    with pytest.raises(HopFailed, match=says):
        await trials.score(b"x", **private)


WORDS = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)


@given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=1, max_size=3), st.text())
async def test_pytest_s_two_names_of_a_test_are_one(
    path: list[str], names: list[str], parameters: str
) -> None:
    """The node id, and class and name in the report, whatever the parameters."""
    suffix = f"[{parameters}]" if parameters else ""
    node = f"{'/'.join(path)}.py::{'::'.join(names)}{suffix}"
    assert canonical(node) == f"{'.'.join([*path, *names])}{suffix}"
    assert canonical(canonical(node)) == canonical(node)
