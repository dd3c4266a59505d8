"""The `repo` tool on a real repository, in a real sandbox: what the policy sees, and what it hands in."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas.events import Call
from tools.errors import ToolError
from tools.registry import load_tools
from tools.repo import PATCH_BYTES, Repo
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits, Session, SessionKind
from tools.sandbox.unsafe import UnsafeSandbox
from tools.tool import Context, Observation, Place

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUGGY = "def add(a, b):\n    return a - b\n"
TESTS = "from calc import add\n\n\ndef test_add():\n    assert add(2, 2) == 4\n"
PYTEST = f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 {sys.executable} -m pytest -q"
Act = Callable[..., Awaitable[Observation]]


def git(folder: Path, *arguments: str) -> str:
    """As somebody with no settings."""
    names = {
        f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    nothing = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env=os.environ | names | nothing,
        capture_output=True,
        check=True,
    )
    return done.stdout.decode().strip()


def commit(folder: Path, message: str, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", f"--message={message}")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where repositories lie: `calc`, whose future has the fix."""
    folder = tmp_path_factory.mktemp("repositories")
    calc = folder / "calc"
    calc.mkdir()
    git(calc, "init", "--quiet")
    commit(calc, "the past", {"calc.py": "PAST = 1\n"})
    files = {"calc.py": BUGGY, "tests/test_calc.py": TESTS, ".gitignore": "*.pyc\n__pycache__/\n"}
    base = commit(calc, "the base", files)
    git(calc, "tag", "base", base)
    commit(calc, "the future", {"calc.py": BUGGY.replace("-", "+")})
    return folder


@pytest.fixture(scope="module")
def base(root: Path) -> str:
    return git(root / "calc", "rev-parse", "base")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def repo(root: Path) -> AsyncIterator[Repo]:
    tool = load_tools(["repo"], options={"repo": {"root": str(root), "disk_mb": 32}})["repo"]
    assert isinstance(tool, Repo)
    async with tool.open(Place()):
        yield tool


@pytest_asyncio.fixture(loop_scope="module")
async def context(sandbox: NamespaceSandbox, base: str) -> AsyncIterator[Context]:
    """As a toolbox gives it."""
    opened: list[Session] = []

    async def session(kind: SessionKind, limits: Limits | None = None) -> Session:
        if not opened or not opened[-1].alive:
            opened.append(await sandbox.open_session(kind, limits))
        return opened[-1]

    task = {"repo": "calc", "commit": base}
    yield Context(run=sandbox.run, limits=Limits(), task=task, session=session)
    for one in opened:
        await one.close()


@pytest.fixture
def act(repo: Repo, context: Context) -> Act:
    return acting(repo, context)


def acting(repo: Repo, context: Context) -> Act:
    async def act(function: str, **arguments: Any) -> Observation:
        return await repo(context, {"function": function, "arguments": arguments})

    return act


async def test_a_bug_is_found_mended_and_handed_in(
    act: Act, root: Path, base: str, tmp_path: Path
) -> None:
    """View, run, edit, run, submit; the patch makes of the commit what the policy made."""
    assert (await act("view")).text == "calc.py\ntests/\ntests/test_calc.py\n"
    assert (await act("view", path="calc.py")).text == (
        "     1\tdef add(a, b):\n     2\t    return a - b\n"
    )
    failing = await act("run", command=PYTEST)
    assert not failing.ok
    assert "assert 0 == 4" in failing.text
    assert failing.text.endswith("(exit code 1)")
    edited = await act("edit", path="calc.py", old="a - b", new="a + b")
    assert edited.text == "Edited calc.py:\n     1\tdef add(a, b):\n     2\t    return a + b\n"
    assert (
        await act("create", path="docs/new/a.md", content="é")
    ).text == "Created docs/new/a.md\n"
    assert (await act("run", command=PYTEST)).ok
    done = await act("submit")
    assert done.last
    assert done.text == f"Submitted: a patch of {len(done.handed_in)} bytes."
    assert applied(root, base, done.handed_in, tmp_path) == {
        "calc.py": BUGGY.replace("-", "+").encode(),
        "tests/test_calc.py": TESTS.encode(),
        ".gitignore": b"*.pyc\n__pycache__/\n",
        "docs/new/a.md": "é".encode(),
    }


def applied(root: Path, base: str, patch: bytes, folder: Path) -> dict[str, bytes]:
    """The files that a patch makes of the commit."""
    tree = folder / "applied"
    git(root, "clone", "--quiet", "calc", str(tree))
    git(tree, "checkout", "--quiet", base)
    (folder / "patch").write_bytes(patch)
    if patch:
        git(tree, "apply", "--whitespace=nowarn", str(folder / "patch"))
    paths = [path for path in tree.rglob("*") if path.is_file() and ".git" not in path.parts]
    return {str(path.relative_to(tree)): path.read_bytes() for path in paths}


async def test_neither_past_nor_future_can_be_read(act: Act, root: Path, base: str) -> None:
    """git works, and knows one commit."""
    seen = await act(
        "run", command="git log --all --format=%s; git status --short; git diff | head"
    )
    assert seen.text == "the base\n"
    future = git(root / "calc", "rev-parse", "HEAD")
    for other in (future, f"{base}~1"):
        assert not (await act("run", command=f"git show {other}")).ok
    assert (
        await act("run", command="grep -rl PAST . ; git count-objects -v | grep in-pack")
    ).text == ("in-pack: 6\n")


async def test_nothing_changed_is_an_empty_patch(act: Act) -> None:
    done = await act("submit")
    assert (done.last, done.handed_in) == (True, b"")


@pytest.mark.parametrize(
    "mischief",
    [
        "git add -A; git commit -qm mine",
        "rm -rf .git",
        "echo 'calc.py' > .git/info/exclude; git update-index --assume-unchanged calc.py",
        "git config --global core.autocrlf true; git config diff.external false; rm .git/HEAD",
    ],
)
async def test_what_is_done_to_git_changes_no_patch(act: Act, mischief: str) -> None:
    """The patch is from the commit to the work tree."""
    await act("edit", path="calc.py", old="a - b", new="a + b")
    assert (await act("run", command=mischief)).ok
    done = await act("submit")
    assert b"-    return a - b\n+    return a + b\n" in done.handed_in


async def test_errors_of_an_edit_say_what_to_do(act: Act) -> None:
    """And change nothing."""
    await act("create", path="a", content="one\ntwo\none\n")
    assert (await act("edit", path="a", old="three", new="")).text == (
        "Not edited: a does not contain `old`. It must match exactly.\n"
    )
    twice = await act("edit", path="a", old="one", new="1")
    assert twice.text.startswith("Not edited: `old` occurs more than once in a, on lines 1, 3.")
    assert not twice.ok
    assert (await act("edit", path="b", old="x", new="y")).text == "No such file or directory: b\n"
    assert (await act("create", path="a", content="")).text == "a exists: edit it\n"
    assert (await act("run", command="cat a")).text == "one\ntwo\none\n"


async def test_views_are_paged(act: Act) -> None:
    files = "seq 1000 > numbers; printf 'a\\0b' > binary; head -c 5m /dev/zero > big; mkdir d e"
    await act("run", command=rf"{files}; touch d/$'caf\xe9'")
    assert (await act("view", path="d")).text == "d/caf\N{REPLACEMENT CHARACTER}\n"
    assert (await act("view", path="e")).text == "(e is empty)\n"
    first = await act("view", path="numbers")
    assert first.text.startswith("     1\t1\n")
    assert first.text.endswith("   200\t200\n(numbers has 1000 lines)\n")
    some = await act("view", path="numbers", start=999)
    assert some.text == "   999\t999\n  1000\t1000\n(numbers has 1000 lines)\n"
    for start, end in ((1001, 0), (0, 5), (7, 6)):
        assert not (await act("view", path="numbers", start=start, end=end)).ok
    assert (await act("view", path="binary")).text == "binary is a binary file\n"
    assert "too many to show" in (await act("view", path="big")).text


async def test_a_command_that_takes_too_long_is_ended_and_no_more(
    repo: Repo, context: Context, processes_with: Callable[[str], list[int]], marker: str
) -> None:
    """Its output is shown, its processes are gone, its files stay."""
    act = acting(repo, replace(context, limits=Limits(wall_s=1.0)))
    await act("view")
    sleeper = f"touch here; echo begun; python3 -c 'import time; time.sleep(99)' {marker}"
    seen = await act("run", command=sleeper)
    assert (seen.text, seen.ok) == ("begun\nTimed out after 1 s.", False)
    assert processes_with(marker) == []
    assert (await act("run", command="ls here")).text == "here\n"


async def test_the_background_does_not_speak_in_between(act: Act) -> None:
    """It goes on, and prints to nobody: later results and the patch are what they are."""
    loop = "yes noise & (while :; do touch tick; sleep 0.01; done) & echo started"
    assert "started\n" in (await act("run", command=loop)).text
    assert (
        await act("run", command="rm -f tick; until [ -e tick ]; do :; done")
    ).text == "(no output)"
    assert b"noise" not in (await act("submit")).handed_in


async def test_a_long_output_loses_its_middle(act: Act) -> None:
    seen = await act("run", command="seq 100000")
    assert seen.text.startswith("1\n2\n")
    assert seen.text.endswith("99999\n100000\n")
    assert "bytes left out]" in seen.text


async def test_a_session_that_the_policy_ends_begins_again(act: Act) -> None:
    """Its changes are gone, and it is told so."""
    await act("edit", path="calc.py", old="a - b", new="a + b")
    ended = await act("run", command="kill -9 $PPID")
    assert "The session has ended" in ended.text
    assert "a - b" in (await act("view", path="calc.py")).text


async def test_too_large_a_patch_is_refused(act: Act) -> None:
    """The policy is told, and may go on."""
    await act("run", command=f"head -c {PATCH_BYTES} /dev/urandom > junk")
    seen = await act("submit")
    assert not seen.last
    assert seen.text.startswith("Not submitted: the patch has ")
    await act("run", command="rm junk")
    assert (await act("submit")).last


async def test_a_full_disk_is_an_error_of_the_command(act: Act) -> None:
    """`disk_mb` holds for everything that is written."""
    seen = await act("run", command="head -c 40m /dev/zero > junk; echo $?; rm junk")
    assert "No space left" in seen.text
    assert (await act("submit")).last


# -- any change is handed in as it is --------------------------------------------------------------

NAMES = st.sampled_from(["calc.py", "tests/test_calc.py", "new", "a b/é", "-x", ".hidden", "x.pyc"])
CONTENTS = st.none() | st.binary(max_size=40) | st.text(max_size=40).map(str.encode)
WRITE = """
import json, os, sys
for name, content in json.loads(sys.argv[1]).items():
    if content is None:
        if os.path.exists(name):
            os.remove(name)
    else:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        open(name, "wb").write(bytes.fromhex(content))
"""


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(NAMES, CONTENTS, max_size=4))
async def test_a_patch_carries_any_bytes(
    act: Act, root: Path, base: str, changes: dict[str, bytes | None]
) -> None:
    """Binary files, deletions, names with spaces: applied to the commit it gives the same files, but ignored ones."""
    await act("run", command="git clean -fdxq; git reset --quiet --hard")
    written = {name: None if text is None else text.hex() for name, text in changes.items()}
    script = shlex.join([sys.executable, "-c", WRITE, json.dumps(written)])
    assert (await act("run", command=script)).ok
    patch = (await act("submit")).handed_in
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        before = applied(root, base, b"", Path(first))
        after = applied(root, base, patch, Path(second))
    wanted = before | {name: text for name, text in changes.items() if name != "x.pyc"}
    assert after == {name: text for name, text in wanted.items() if text is not None}


async def test_calls_are_checked(repo: Repo) -> None:
    """By the signature of the action."""

    def check(function: str, **arguments: Any) -> str:
        call = Call(tool="repo", arguments={"function": function, "arguments": arguments})
        return repo.check(call)

    assert check("view", path="a", start="3") == ""
    assert check("edit", path="a") == "Wrong arguments for edit: `old` is missing"
    assert "there are: view, edit, create, run, submit" in check("delete")


async def test_a_large_work_tree_has_room_for_its_files(sandbox: NamespaceSandbox) -> None:
    """`disk_mb` brings with it how many files there may be."""
    with Repo().configured({"disk_mb": 128, "memory_mb": 700}).repositories("") as repositories:
        limits = repositories.with_room(Limits())
    seen = await sandbox.run("import os; os.statvfs('/tmp').f_files", limits=limits)
    assert int(seen.output) == 16384
    assert limits.memory_bytes == 700 << 20


async def test_a_tier_without_namespaces(repo: Repo, context: Context) -> None:
    """The work tree is in the job's own folder, wherever that is."""
    sandbox = UnsafeSandbox()
    session = await sandbox.open_session("python")

    async def the_one(*_: object) -> Session:
        return session

    act = acting(repo, replace(context, run=sandbox.run, session=the_one))
    await act("edit", path="calc.py", old="a - b", new="a + b")
    assert (await act("run", command="git status --short")).text == " M calc.py\n"
    assert b"+    return a + b\n" in (await act("submit")).handed_in
    await session.close()
    await sandbox.close()


async def test_without_git_nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a run nor a toolbox: it is said before the first trajectory, with what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = load_tools(["repo"])["repo"]
    with pytest.raises(ToolError, match="install it"):
        await tool.resolve(Place())
    with pytest.raises(ToolError, match="install it"):
        async with tool.open(Place()):
            pass
