"""Sessions of the `ns` sandbox: what is kept from run to run, what limits do to it, and how one ends."""

import asyncio
import os
import shlex
import signal
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tools.errors import SandboxError
from tools.sandbox import job_session, shell
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits, Outcome, Session
from tools.sandbox.streams import Answers

pytestmark = pytest.mark.asyncio(loop_scope="module")

FindProcesses = Callable[[str], list[int]]
SHORT = Limits(wall_s=0.5)


@pytest_asyncio.fixture(loop_scope="module")
async def cells(sandbox: NamespaceSandbox) -> AsyncIterator[Session]:
    """A Python session of one's own."""
    session = await sandbox.open_session("python")
    yield session
    await session.close()


@pytest_asyncio.fixture(loop_scope="module")
async def bash(sandbox: NamespaceSandbox) -> AsyncIterator[Session]:
    """A shell of one's own."""
    session = await sandbox.open_session("bash")
    yield session
    await session.close()


def ended(outcome: Outcome) -> tuple[str, str, int, str]:
    return outcome.output.decode(), outcome.reason, outcome.exit_code, outcome.session


# -- python ----------------------------------------------------------------------------------------


async def test_cells_share_their_variables(cells: Session) -> None:
    """Names, imports, files and the working directory are kept; the last expression is printed."""
    await cells.run("import math, os\nx = 2\nopen('kept', 'w').write('a')\nos.mkdir('d')")
    assert ended(await cells.run("math.pi > 3, x, open('kept').read(), os.chdir('d')")) == (
        "(True, 2, 'a', None)\n",
        "exit",
        0,
        "kept",
    )
    assert ended(await cells.run("os.getcwd(), __name__"))[0] == "('/tmp/d', '__main__')\n"


async def test_an_error_ends_the_cell_and_not_the_session(cells: Session) -> None:
    """The traceback names the cell and shows its line; functions of earlier cells are in it."""
    await cells.run("def divide(x):\n    return 1 / x")
    failed = await cells.run("divide(0)")
    text = failed.output.decode()
    assert (failed.reason, failed.exit_code, failed.session) == ("exit", 1, "kept")
    assert 'File "<cell 2>", line 1' in text
    assert 'File "<cell 1>", line 2, in divide\n    return 1 / x' in text
    assert "session_cells" not in text
    assert ended(await cells.run("divide(4)"))[0] == "0.25\n"
    assert ended(await cells.run("exit(3)")) == ("", "exit", 3, "kept")
    assert ended(await cells.run("divide(2)"))[0] == "0.5\n"


async def test_each_cell_has_its_own_stdin(cells: Session) -> None:
    """It is at its end for a cell that is given none, and fresh after that."""
    assert ended(await cells.run("input()", stdin=b"a\nb\n"))[0] == "'a'\n"
    assert (await cells.run("input()")).output.endswith(b"EOFError: EOF when reading a line\n")
    code = "import subprocess\nsubprocess.check_output('cat')"
    assert ended(await cells.run(code, stdin=b"c"))[0] == "b'c'\n"


async def test_a_cell_that_takes_too_long_is_interrupted(cells: Session) -> None:
    """What it printed is there, its variables too, and the next cell runs."""
    await cells.run("x = 1")
    code = "import time\nx = 2\nprint('before')\ntime.sleep(60)"
    text, reason, _, session = ended(await cells.run(code, limits=SHORT))
    assert text.startswith("before\n")
    assert text.endswith("KeyboardInterrupt\n")
    assert (reason, session) == ("wall", "kept")
    assert ended(await cells.run("x"))[0] == "2\n"


async def test_a_cell_that_does_not_give_in_ends_the_session(cells: Session) -> None:
    """It ignores the interruption, so all of it is killed; what it printed is there, and nothing runs after it."""
    code = "import signal, time\nsignal.signal(2, signal.SIG_IGN)\nprint('before')\nwhile 1: time.sleep(1)"
    assert ended(await cells.run(code, limits=SHORT)) == ("before\n", "wall", -9, "ended")
    assert not cells.alive
    with pytest.raises(SandboxError, match="session_over"):
        await cells.run("1")


async def test_too_much_output_interrupts_the_cell(cells: Session) -> None:
    """Exactly the limit's bytes are kept, and the next cell's output is its own."""
    flood = await cells.run("while True: print('x' * 99)", limits=Limits(output_bytes=1234))
    assert (len(flood.output), flood.reason, flood.session) == (1234, "output", "kept")
    assert ended(await cells.run("print('y')"))[0] == "y\n"


async def test_processor_time_is_of_each_cell(cells: Session) -> None:
    """The cell that has used its own ends with an error; the next has its own."""
    for _ in range(2):
        outcome = await cells.run("while True: pass", limits=Limits(cpu_s=1, wall_s=60))
        assert (outcome.reason, outcome.exit_code, outcome.session) == ("exit", 1, "kept")
        assert b"ProcessorTimeExceeded" in outcome.output
    assert ended(await cells.run("1"))[0] == "1\n"


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import os; os._exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
    ],
)
async def test_a_session_whose_process_dies_has_ended(
    cells: Session, code: str, exit_code: int
) -> None:
    """That is an outcome, not a failure of the sandbox."""
    outcome = await cells.run(code)
    assert (outcome.reason, outcome.exit_code, outcome.session) == ("exit", exit_code, "ended")
    assert not cells.alive


async def test_a_forked_cell_answers_once(cells: Session) -> None:
    """The child ends with the cell; it does not read the next one."""
    code = "import os\nif p := os.fork(): os.waitpid(p, 0)\nprint(p > 0)"
    assert ended(await cells.run(code))[0] == "False\nTrue\n"
    for number in range(5):
        assert ended(await cells.run(f"print({number})"))[0] == f"{number}\n"


async def test_code_cannot_forge_an_end_of_the_sandbox(cells: Session) -> None:
    """Whatever it writes to the descriptors it has, the outcome is one of its own."""
    code = """
import os
for fd in range(3, 256):
    try: os.write(fd, b"{]\\n" * 1000)
    except OSError: pass
"""
    outcome = await cells.run(code)
    assert outcome.session == "ended"
    assert outcome.reason == "exit"


async def test_figures_come_back_as_png() -> None:
    """Those that are open at the end of a cell, once; a session without matplotlib imports nothing."""
    sandbox = NamespaceSandbox(["matplotlib.pyplot"])
    limits = Limits(image_bytes=1 << 20)
    draw = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.figure()\nplt.show()"
    try:
        called = await sandbox.run(draw, limits=limits)
        assert called.output == b""
        assert [image[:4] for image in called.images] == [b"\x89PNG"] * 2
        assert (await sandbox.run(draw)).images == []
        one_only = Limits(image_bytes=len(called.images[0]) + 10)
        assert (await sandbox.run(draw, limits=one_only)).images == called.images[:1]
        session = await sandbox.open_session("python")
        assert (await session.run(draw, limits=limits)).images == called.images
        assert (await session.run("plt.get_fignums()", limits=limits)).images == []
        await session.close()
    finally:
        await sandbox.close()


# -- bash ------------------------------------------------------------------------------------------


async def test_the_shell_keeps_what_shells_keep(bash: Session) -> None:
    """Directory, variables, exported ones, functions, aliases, options and the last exit code."""
    script = "mkdir -p /tmp/d; cd /tmp/d; x=1; declare y=2; export Z=3; f() { echo f $1; }; set -o nounset; (exit 7)"
    assert ended(await bash.run(script)) == ("", "exit", 7, "kept")
    text, *rest = ended(
        await bash.run('echo $? $PWD $x $y; f 5; bash -c "echo $Z"; set -o | grep nounset')
    )
    assert text.split() == ["7", "/tmp/d", "1", "2", "f", "5", "3", "nounset", "on"]
    assert rest == ["exit", 0, "kept"]


@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ("for i in 1 2\ndo\n  echo $i\ndone", "1\n2\n"),
        ("cat <<'END'\n$HOME 'a' \"b\"\nEND", "$HOME 'a' \"b\"\n"),
        ("if true; then\n\n  echo yes # and a comment\nfi\n", "yes\n"),
        ('echo "it\'s" \'a "b"\' \\\\ \\$x !! é☃', 'it\'s a "b" \\ $x !! é☃\n'),
        ("python3 - <<'END'\nfor i in range(2):\n    print(i)\nEND", "0\n1\n"),
        ("cat; echo none", "none\n"),
        ("read line || echo none", "none\n"),
        ("echo out; echo err >&2; echo out", "out\nerr\nout\n"),
        ("", ""),
        ("# nothing", ""),
        ("yes | head -2", "y\ny\n"),
        ("history | wc -l", "0\n"),
    ],
)
async def test_scripts_run_whole(bash: Session, script: str, printed: str) -> None:
    """Loops, here-documents, quotes and pipes of many lines; standard input is empty."""
    assert ended(await bash.run(script)) == (printed, "exit", 0, "kept")


@pytest.mark.parametrize("script", ["echo 'open", "if", "for i in", "cat <(", ")", "ls /none \\"])
async def test_a_script_that_is_not_complete_does_not_wait_for_more(
    bash: Session, script: str
) -> None:
    """It is an error of the script, and the next one is read from its own beginning."""
    outcome = await bash.run(script)
    assert outcome.exit_code != 0
    assert (outcome.reason, outcome.session) == ("exit", "kept")
    assert ended(await bash.run("echo next")) == ("next\n", "exit", 0, "kept")


@pytest.mark.parametrize(
    "script",
    [
        "x=2; sleep 60",
        "x=2; while :; do :; done",
        "x=2; while :; do sleep 0.01; done",
        "x=2; cat /dev/zero >/dev/null",
    ],
)
async def test_a_script_that_takes_too_long_is_interrupted(
    bash: Session, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it does, the shell and its variables are kept. (bash itself loses a signal now and then.)"""
    monkeypatch.setitem(job_session._ATTEMPTS, "bash", 40)
    monkeypatch.setattr(job_session, "_INTERRUPT_S", 20.0)
    outcome = await bash.run(script, limits=SHORT)
    assert (outcome.reason, outcome.exit_code, outcome.session) == ("wall", 130, "kept")
    assert ended(await bash.run("echo $? $x")) == ("130 2\n", "exit", 0, "kept")


async def test_who_is_started_in_the_background_interrupts_all_the_same() -> None:
    """A shell has SIGINT ignored there (`actors … &` in a script), and whatever it starts inherits that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sandbox = NamespaceSandbox()
        bash = await sandbox.open_session("bash")
    finally:
        signal.signal(signal.SIGINT, before)
    outcome = await bash.run("sleep 60", limits=SHORT)
    await bash.close()
    await sandbox.close()
    assert (outcome.reason, outcome.exit_code, outcome.session) == ("wall", 130, "kept")


async def test_a_shell_that_exits_is_started_again(bash: Session) -> None:
    """Files, directory and environment are kept, functions and variables are not; `set -e` is such an exit."""
    left = await bash.run("cd /usr; x=1; export Y=2; touch /tmp/f; exit 3")
    assert ended(left)[1:] == ("exit", 3, "restarted")
    assert ended(await bash.run("echo [$x] $Y $PWD; ls /tmp/f"))[0] == "[] 2 /usr\n/tmp/f\n"
    assert ended(await bash.run("set -e; false; echo not here"))[1:] == ("exit", 1, "restarted")
    assert ended(await bash.run("PATH=/nowhere; exit 4"))[1:] == ("exit", 4, "restarted")
    await bash.run("PATH=/usr/bin:/bin")
    assert ended(await bash.run("exec true"))[3] == "ended"


async def test_background_jobs_go_on_and_die_with_the_session(
    sandbox: NamespaceSandbox, marker: str, processes_with: FindProcesses
) -> None:
    """A job is there in the next run, and survives its interruption; closing the session ends it."""
    bash = await sandbox.open_session("bash")
    sleeper = f"python3 -c 'import time; time.sleep(600)' {marker}"
    await bash.run(f"{sleeper} & setsid nohup {sleeper} >/dev/null 2>&1 &")
    await bash.run("sleep 60", limits=SHORT)
    assert ended(await bash.run(f"pgrep -fc '[m]arker-{marker[7:]}'"))[0] == "2\n"
    assert len(processes_with(marker)) == 2
    assert await bash.memory_bytes() > 1 << 20
    await bash.close()
    assert processes_with(marker) == []
    assert await bash.memory_bytes() == 0


async def test_a_hundred_turns(bash: Session) -> None:
    """Answers stay with their scripts, whatever came before."""
    for number in range(100):
        kinds = [
            f"echo {number}",
            f"printf '{number}\\n' >&2",
            f"x={number}\necho $x",
            f"(echo {number}; exit 5)",
        ]
        outcome = await bash.run(kinds[number % 4])
        assert outcome.output == b"%d\n" % number
        assert outcome.exit_code == (5 if number % 4 == 3 else 0)


# -- any session -----------------------------------------------------------------------------------


async def test_memory_is_of_the_whole_session(sandbox: NamespaceSandbox) -> None:
    """What earlier cells keep counts; the limit ends the session, also between two runs."""
    session = await sandbox.open_session("python", Limits(memory_bytes=100 << 20))
    await session.run("a = bytearray(b'x') * (60 << 20)")
    assert session.alive
    outcome = await session.run("b = bytearray(b'x') * (60 << 20)\nimport time\ntime.sleep(60)")
    assert (outcome.reason, outcome.session) == ("memory", "ended")
    later = await sandbox.open_session("python", Limits(memory_bytes=100 << 20))
    await later.run(
        "import threading\n"
        "def eat():\n"
        "    global b\n"
        "    b = bytearray(b'x') * (120 << 20)\n"
        "threading.Timer(0.2, eat).start()"
    )
    async with asyncio.timeout(20):
        while later.alive:  # noqa: ASYNC110 - the watcher's verdict is what is waited for
            await asyncio.sleep(0.01)
    outcome = await later.run("1")
    assert (outcome.reason, outcome.session) == ("memory", "ended")


async def test_what_it_takes_is_known(sandbox: NamespaceSandbox) -> None:
    """Variables and files in memory, asked between two runs."""
    session = await sandbox.open_session("python")
    small = await session.memory_bytes()
    await session.run("x = bytearray(b'x') * (40 << 20)")
    await session.run("open('file', 'wb').write(x)")
    assert 80 << 20 < await session.memory_bytes() < small + (90 << 20)
    await session.close()
    assert await session.memory_bytes() == 0


async def test_who_gives_up_closing_leaves_nothing(
    sandbox: NamespaceSandbox, marker: str, processes_with: FindProcesses
) -> None:
    """Its processes end, and its descriptors are closed (pytest raises what is left open)."""
    session = await sandbox.open_session("bash")
    await session.run(f"python3 -c 'import time; time.sleep(600)' {marker} &")
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    async with asyncio.timeout(20):
        while processes_with(marker):  # noqa: ASYNC110 - processes send no events
            await asyncio.sleep(0.01)


async def test_a_session_has_its_time(sandbox: NamespaceSandbox) -> None:
    """At its end the running cell is killed, and the reason is told."""
    session = await sandbox.open_session("python", Limits(session_s=3.0))
    outcome = await session.run("import time\ntime.sleep(60)")
    assert (outcome.reason, outcome.session) == ("wall", "ended")


async def test_cancelling_a_run_closes_the_session(
    sandbox: NamespaceSandbox, marker: str, processes_with: FindProcesses
) -> None:
    """Nobody knows what state it would be in; its processes are gone."""
    session = await sandbox.open_session("bash")
    run = asyncio.ensure_future(session.run(f"python3 -c 'import time; time.sleep(600)' {marker}"))
    async with asyncio.timeout(20):
        while not processes_with(marker):  # noqa: ASYNC110 - processes send no events
            await asyncio.sleep(0.01)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not session.alive
    assert processes_with(marker) == []


async def test_sessions_do_not_meet(sandbox: NamespaceSandbox) -> None:
    """Each has its own files and processes; idle time is told."""
    first, second = [await sandbox.open_session("bash") for _ in range(2)]
    await first.run("touch /tmp/mine; touch /dev/shm/mine; sleep 100 &")
    seen = ended(await second.run("ls /tmp /dev/shm; pgrep -c sleep"))[0]
    assert "mine" not in seen
    assert seen.endswith("0\n")
    assert 0 < first.idle_s < 60
    await first.close()
    await second.close()


async def test_the_death_of_the_server_is_a_failure() -> None:
    """Not an outcome: the code has not done it."""
    sandbox = NamespaceSandbox()
    session = await sandbox.open_session("python")
    run = asyncio.ensure_future(session.run("import time\ntime.sleep(60)"))
    await asyncio.sleep(0)
    await sandbox.close()
    with pytest.raises(SandboxError, match="zygote_died"):
        await run
    assert not session.alive


@settings(database=None)  # these tests also run where they may not write
@given(script=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
async def test_a_command_line_holds_any_script(script: str) -> None:
    """To bash it is one complete command, whatever is in it: the script arrives as one word."""
    line = shell.command_line(1, script).decode()
    before, quoted_and_after = line.split("eval ", 1)
    ending = "\\" if (len(script) - len(script.rstrip("\\"))) % 2 else ""
    begun, _, after = shlex.split(quoted_and_after)[0].rpartition("\n")
    assert begun + ending == "$__options" + script
    assert after == "if __end $?; then :; fi >/dev/null 2>&1"
    assert before.startswith("{ __run=1;")


@settings(database=None)
@given(content=st.binary(max_size=300))
@example(content=b'{"junk":' + b"[" * 3000 + b"\n")
@example(content=b'{"run":1,"\xff":"\xff"}\n')
async def test_answers_survive_anything(content: bytes) -> None:
    """What hostile code writes there is an answer, or garbage that is not listened to."""
    read_fd, write_fd = os.pipe()
    answers = Answers(read_fd, lambda: None)
    answers.image_limit_bytes = 100
    try:
        os.write(write_fd, content)
        os.close(write_fd)
        answers.drain()
        while found := answers.take():
            assert sum(map(len, found[1])) <= 100
    finally:
        answers.close()
