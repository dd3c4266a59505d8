"""What the `ns` sandbox does for honest code, and for its client. Attacks are in test_attacks.py."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
import venv
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from tools.errors import SandboxError
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits

pytestmark = pytest.mark.asyncio(loop_scope="module")

FindProcesses = Callable[[str], list[int]]


async def output_of(sandbox: NamespaceSandbox, code: str, stdin: bytes = b"") -> str:
    outcome = await sandbox.run(code, stdin=stdin)
    return outcome.output.decode()


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until processes have started or ended."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the processes of others send no events
            await asyncio.sleep(0.01)


# -- code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print('hi')", "hi\n"),
        ("1 + 1", "2\n"),
        ("'a'", "'a'\n"),
        ("None", ""),
        ("x = 1", ""),
        ("x = 1\nx", "1\n"),
        ("1\n2", "2\n"),
        ("def f():\n    return 3\nf()", "3\n"),
        ("if True:\n    4", ""),
        ("", ""),
        ("# nothing", ""),
        ("from __future__ import annotations\nprint(5)", "5\n"),
        ("__name__", "'__main__'\n"),
        (
            "import sys\nprint('out'); print('err', file=sys.stderr); print('out')",
            "out\nerr\nout\n",
        ),
        ("print('é☃')", "é☃\n"),
        ("import sys\nsys.argv", "['main.py']\n"),
    ],
)
async def test_code_runs_as_a_notebook_cell(
    sandbox: NamespaceSandbox, code: str, printed: str
) -> None:
    """Code is `__main__`; the value of a last expression is printed unless it is None."""
    outcome = await sandbox.run(code)
    assert (outcome.output.decode(), outcome.reason, outcome.exit_code) == (printed, "exit", 0)


async def test_a_traceback_shows_the_code_and_nothing_of_ours(sandbox: NamespaceSandbox) -> None:
    """The file is main.py, source lines are there, frames of the sandbox are not."""
    outcome = await sandbox.run("def divide(x):\n    return 1 / x\n\ndivide(0)")
    text = outcome.output.decode()
    assert outcome.exit_code == 1
    assert text.startswith('Traceback (most recent call last):\n  File "main.py", line 4')
    assert "return 1 / x" in text
    assert text.endswith("ZeroDivisionError: division by zero\n")
    assert "cell.py" not in text
    assert "zygote" not in text


@pytest.mark.parametrize("code", ["def f(:\n  pass", "print('a\n", "\0", "'\ud800", "x = (\n"])
async def test_a_syntax_error_is_told_without_our_frames(
    sandbox: NamespaceSandbox, code: str
) -> None:
    """Text that is not Python is an error of the code's author, in the usual form."""
    outcome = await sandbox.run(code)
    assert outcome.exit_code == 1
    assert b"Error: " in outcome.output
    assert b"cell.py" not in outcome.output


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("raise SystemExit", 0),
        ("import sys; sys.exit(3)", 3),
        ("exit('why')", 1),
        ("import os; os._exit(137)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise KeyboardInterrupt", 1),
    ],
)
async def test_exit_codes_are_those_of_popen(
    sandbox: NamespaceSandbox, code: str, exit_code: int
) -> None:
    """Exits and signals are told apart."""
    outcome = await sandbox.run(code)
    assert (outcome.reason, outcome.exit_code) == ("exit", exit_code)


async def test_stdin_is_given_whole(sandbox: NamespaceSandbox) -> None:
    """Bytes arrive as they are, larger than any pipe; then the end of file."""
    assert await output_of(sandbox, "input() + input()", stdin=b"a\nb\n") == "'ab'\n"
    assert (await sandbox.run("input()")).output.endswith(b"EOFError: EOF when reading a line\n")
    blob = os.urandom(3 << 20)
    code = "import sys, hashlib\nprint(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    assert (await output_of(sandbox, code, stdin=blob)).strip() == sha256(blob).hexdigest()


async def test_a_program_ends_as_programs_do(sandbox: NamespaceSandbox) -> None:
    """Threads are joined and exit handlers run, also after an error."""
    code = (
        "import atexit, threading, time\n"
        "atexit.register(print, 'bye')\n"
        "threading.Thread(target=lambda: (time.sleep(1), print('thread'))).start()\n"
        "1 / 0"
    )
    text = await output_of(sandbox, code)
    assert text.endswith("ZeroDivisionError: division by zero\nthread\nbye\n")


async def test_ordinary_programs_work(sandbox: NamespaceSandbox) -> None:
    """Files, subprocesses, process pools, asyncio, dataclasses and pickles."""
    code = """
import asyncio, dataclasses, multiprocessing, pickle, subprocess, sys, tempfile
@dataclasses.dataclass
class Point:
    x: int
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("kept"); file.seek(0); print(file.read())
print(subprocess.run([sys.executable, "-c", "print(6)"], capture_output=True, text=True).stdout)
print(subprocess.check_output("echo shell", shell=True, text=True))
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(abs, [-1, -2]))
print(asyncio.run(asyncio.sleep(0, 7)))
print(pickle.loads(pickle.dumps(Point(8))))
"""
    words = (await output_of(sandbox, code)).split()
    assert words == ["kept", "6", "shell", "[1,", "2]", "7", "Point(x=8)"]


async def test_imports_are_ready_and_random_numbers_differ() -> None:
    """A preloaded module is there at once; forks of one server do not repeat each other's numbers."""
    sandbox = NamespaceSandbox(["numpy.random"])
    try:
        assert await output_of(sandbox, "import sys\n'numpy' in sys.modules") == "True\n"
        code = "import random, numpy\nrandom.random(), numpy.random.rand()"
        first, second = [eval(await output_of(sandbox, code)) for _ in range(2)]
        assert first[0] != second[0]
        assert first[1] != second[1]
        assert await output_of(sandbox, "len(set(map(str, range(9)))), hash('a')") == (
            await output_of(sandbox, "len(set(map(str, range(9)))), hash('a')")
        )
    finally:
        await sandbox.close()


async def test_each_set_of_imports_has_its_own_server() -> None:
    """Started when it is needed, the same one each time; closed with the sandbox that it belongs to."""
    whole = NamespaceSandbox(["decimal"])
    other = whole.importing(["fractions", "wave"])
    assert whole.importing(("decimal",)) is whole
    assert whole.importing(("fractions", "wave")) is other
    code = "import sys\n[name for name in ('decimal', 'wave') if name in sys.modules]"
    assert await output_of(whole, code) == "['decimal']\n"
    assert "wave" in await output_of(other, code)
    await whole.close()
    with pytest.raises(SandboxError, match="closed"):
        await other.run("1")


async def test_an_import_that_is_not_there_is_told() -> None:
    """The server does not start, and says why."""
    sandbox = NamespaceSandbox(["no_such_module"])
    with pytest.raises(SandboxError, match=r"start_failed.*no_such_module"):
        await sandbox.run("1")
    await sandbox.close()


async def test_an_interpreter_below_tmp_can_be_used(tmp_path: Path) -> None:
    """The call's own /tmp does not hide the virtual environment that the server was started from."""
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "beside.py").write_text("here = __file__")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path))
    program = (
        "import asyncio\n"
        "from tools.sandbox.ns import NamespaceSandbox\n"
        "async def main():\n"
        "    sandbox = NamespaceSandbox()\n"
        "    code = 'import beside, os, sys; print(beside.here, os.listdir(), sys.path)'\n"
        "    print((await sandbox.run(code)).output.decode())\n"
        "    await sandbox.close()\n"
        "asyncio.run(main())\n"
    )
    python = tmp_path / "venv" / "bin" / "python"
    process = await asyncio.create_subprocess_exec(
        python, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    top = tmp_path.relative_to("/tmp").parts[0]
    assert output.decode().startswith(f"{packages}/beside.py ['{top}']")


# -- limits ----------------------------------------------------------------------------------------


async def test_what_was_printed_before_the_wall_limit_is_kept(sandbox: NamespaceSandbox) -> None:
    """Partial output counts; the time is about the limit."""
    outcome = await sandbox.run(
        "import time\nprint('before')\ntime.sleep(60)", limits=Limits(wall_s=3.0)
    )
    assert (outcome.output, outcome.reason, outcome.exit_code) == (b"before\n", "wall", -9)
    assert 3000 <= outcome.wall_ms < 20_000


async def test_output_is_cut_at_its_limit(sandbox: NamespaceSandbox) -> None:
    """Endless output ends the call, with exactly the limit's bytes; a full pipe is not a limit."""
    outcome = await sandbox.run("while True: print('x' * 99)", limits=Limits(output_bytes=12_345))
    assert (len(outcome.output), outcome.reason) == (12_345, "output")
    outcome = await sandbox.run("print('x' * 999_999)")
    assert (len(outcome.output), outcome.reason) == (1_000_000, "exit")


async def test_processor_time_is_limited(sandbox: NamespaceSandbox) -> None:
    """The kernel's signal for it ends the process."""
    outcome = await sandbox.run("while True: pass", limits=Limits(cpu_s=1))
    assert (outcome.reason, outcome.exit_code) == ("exit", -signal.SIGXCPU)


# -- the client ------------------------------------------------------------------------------------


async def test_cancelling_kills_the_code(
    sandbox: NamespaceSandbox, marker: str, processes_with: FindProcesses
) -> None:
    """A call that nobody awaits does not run on, nor do its children; others do."""
    other = asyncio.ensure_future(sandbox.run("import time\ntime.sleep(1)\nprint('fine')"))
    call = await started(sandbox, marker, processes_with)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: not processes_with(marker))
    assert (await other).output == b"fine\n"


def servers() -> list[psutil.Process]:
    """The fork servers of this process, as they are seen from outside their worlds."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # another's, which has just ended
            found += [process] if "tools.sandbox.zygote" in process.cmdline() else []
    return found


def inner_server(outer: psutil.Process) -> psutil.Process:
    (inner,) = outer.children()
    return inner


async def opened() -> tuple[NamespaceSandbox, psutil.Process, psutil.Process]:
    """A sandbox of one's own, and its server outside and inside."""
    before = servers()
    sandbox = NamespaceSandbox()
    await sandbox.run("1")
    (outer,) = [process for process in servers() if process not in before]
    return sandbox, outer, inner_server(outer)


async def started(sandbox: NamespaceSandbox, marker: str, find: FindProcesses) -> asyncio.Future:
    """A call that sleeps, when its code runs."""
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}]"
    code = f"import subprocess, sys\nsubprocess.run({sleeper})"
    call = asyncio.ensure_future(sandbox.run(code, limits=Limits(wall_s=600)))
    await until(lambda: find(marker))
    return call


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("which", ["outer", "inner"])
async def test_a_dead_server_fails_its_calls_and_is_started_again(
    which: str, busy: bool, marker: str, processes_with: FindProcesses
) -> None:
    """The call that was in it gets `zygote_died`; the next call works, and so it does if it died idle."""
    sandbox, outer, inner = await opened()
    try:
        call = await started(sandbox, marker, processes_with)
        if not busy:
            call.cancel()
            await until(lambda: not processes_with(marker))
        (outer if which == "outer" else inner).kill()
        if busy:
            with pytest.raises(SandboxError, match="zygote_died"):
                await call
        await until(lambda: not outer.is_running() and not inner.is_running())
        assert await output_of(sandbox, "1") == "1\n"
    finally:
        await sandbox.close()


async def test_the_death_of_the_client_ends_everything(
    marker: str, processes_with: FindProcesses
) -> None:
    """A client killed by SIGKILL leaves no server and no code behind."""
    program = (
        "import asyncio, sys\n"
        "from tools.sandbox.ns import NamespaceSandbox\n"
        "code = \"import subprocess, sys; subprocess.run([sys.executable, '-c', "
        "'import time; time.sleep(600)', %r])\" % sys.argv[1][::-1]\n"
        "asyncio.run(NamespaceSandbox().run(code))\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, marker[::-1])
    try:
        await until(lambda: processes_with(marker))
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 5  # outer and inner server, init, payload, its child
    finally:
        process.kill()
        await process.wait()
    await until(lambda: not any(member.is_running() for member in family))


async def test_a_server_that_does_not_measure_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a session's memory does not wait for ever; its next run fails by name."""
    monkeypatch.setattr("tools.sandbox.job_session.GRACE_S", 0.5)
    sandbox, _, inner = await opened()
    sessions = [await sandbox.open_session("python") for _ in range(2)]
    inner.suspend()
    async with asyncio.timeout(20):
        assert [await session.memory_bytes() for session in sessions] == [0, 0]
    assert not any(session.alive for session in sessions)
    with pytest.raises(SandboxError, match=r"no_answer: not measured"):
        await sessions[0].run("1")
    assert await output_of(sandbox, "1") == "1\n"
    await sessions[1].close()
    await sandbox.close()


@pytest.mark.parametrize("calls", [100, pytest.param(2000, marks=pytest.mark.slow)])
async def test_calls_leave_nothing_behind(calls: int) -> None:
    """After many calls there are as many processes, descriptors and mounts as before, and no more memory is taken."""
    sandbox, outer, inner = await opened()
    slots = asyncio.Semaphore(8)

    async def call(number: int) -> None:
        async with slots:
            assert await output_of(sandbox, str(number)) == f"{number}\n"

    def counts() -> tuple[int, int, int]:
        mounts = Path(f"/proc/{inner.pid}/mountinfo").read_text().count("\n")
        return len(inner.children(recursive=True)), count_fds(os.getpid()), mounts

    try:
        await asyncio.gather(*[call(number) for number in range(50)])
        # the template, and the world that stands by
        await until(lambda: len(inner.children(recursive=True)) == 3)
        gc.collect()  # descriptors of earlier tests
        before, memory_before, fds_before = counts(), memory_of(inner), count_fds(inner.pid)
        await asyncio.gather(*[call(number) for number in range(calls)])
        await until(lambda: len(inner.children(recursive=True)) == 3)
        gc.collect()
        assert counts() == before
        assert count_fds(inner.pid) <= fds_before + 9  # empty network namespaces, one for each slot
        assert memory_of(inner) - memory_before < 1 << 20
    finally:
        await sandbox.close()
    assert not outer.is_running()


def memory_of(process: psutil.Process) -> int:
    return int(process.memory_full_info().uss)


def count_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_a_closed_sandbox_runs_nothing(marker: str, processes_with: FindProcesses) -> None:
    """Running calls fail at once, and none starts the server again."""
    sandbox = NamespaceSandbox()
    call = await started(sandbox, marker, processes_with)
    await sandbox.close()
    with pytest.raises(SandboxError, match="zygote_died"):
        await call
    with pytest.raises(SandboxError, match="closed"):
        await sandbox.run("1")


async def test_many_calls_at_once_each_get_their_own_answer(sandbox: NamespaceSandbox) -> None:
    """More calls than packets fit in the queue wait for their turn; answers are not mixed up."""
    outcomes = await asyncio.gather(*[sandbox.run(f"{n} ** 2") for n in range(150)])
    assert [int(outcome.output) for outcome in outcomes] == [n**2 for n in range(150)]


async def test_a_call_is_fast(sandbox: NamespaceSandbox) -> None:
    """A warm call takes milliseconds: the bound is generous, for a busy machine; bench/ has the figure."""
    times_s = []
    for _ in range(30):
        begun = time.perf_counter()
        await sandbox.run("1")
        times_s.append(time.perf_counter() - begun)
    assert min(times_s) < 0.05
