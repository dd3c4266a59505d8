"""What the host lacks is a failure of the sandbox by its name, and of that call alone: never an observation."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from tools.errors import SandboxError
from tools.sandbox.docker import DockerServer
from tools.sandbox.job_session import JobSession
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits

pytestmark = pytest.mark.asyncio(loop_scope="module")

PRELUDE = """
import asyncio, json, resource, sys
from tools.errors import SandboxError
from tools.sandbox import linux
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.unsafe import UnsafeSandbox
from tools.sandbox.sandbox import Limits

async def end_of(work):
    try:
        outcome = await work
    except SandboxError as error:
        return str(error)
    return [outcome.reason, outcome.exit_code, outcome.output.decode()]

def allow_files(most):
    linux.drop_capabilities()  # even root's code may not raise it again
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
"""


async def printed_by(program: str) -> dict:
    """What a process of its own says, with limits of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PRELUDE + program, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(120):
        output, _ = await process.communicate()
    return dict(json.loads(output))


@pytest.mark.parametrize("most", [20, 41])
async def test_calls_without_descriptors_fail_alone(most: int) -> None:
    """Those that run are right, the others name what lacks; when they have ended the next one runs."""
    program = f"""
async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))
    sandbox = NamespaceSandbox()
    code, limits = "import time; time.sleep(1); print(1)", Limits(files=16, wall_s=60)
    calls = [end_of(sandbox.run(code, limits=limits)) for _ in range(9)]
    ends = await asyncio.gather(*calls)
    later = await end_of(sandbox.run("print(2)", limits=limits))
    await sandbox.close()
    print(json.dumps(dict(ends=ends, later=later)))

asyncio.run(main())
"""
    told = await printed_by(program)
    failed = [end for end in told["ends"] if end != ["exit", 0, "1\n"]]
    assert failed
    assert all("Too many open files" in end for end in failed)
    assert told["later"] == ["exit", 0, "2\n"] or len(failed) == 9


@pytest.mark.parametrize("most", range(60, 65))
async def test_what_runs_goes_on_when_nothing_more_can(most: int) -> None:
    """Sessions are opened until one is refused, and so is a call; one that is closed makes room for another."""
    program = f"""
async def open_as_many(sandbox):
    found = []
    try:
        while True:
            found.append(await sandbox.open_session("python", Limits(files=16)))
    except SandboxError as error:
        return found, str(error)

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))
    sandbox = NamespaceSandbox()
    kept, refusal = await open_as_many(sandbox)
    refusals = [refusal, await end_of(sandbox.run("1", limits=Limits(files=16, image_bytes=9)))]
    for number, session in enumerate(kept):
        await session.run(f"x = {{number}}")
    await asyncio.sleep(0.5)  # the server looks at all of them meanwhile
    outputs = [(await session.run("x")).output.decode() for session in kept]
    await kept.pop().close()
    more, _ = await open_as_many(sandbox)
    await sandbox.close()
    print(json.dumps(dict(refusals=refusals, outputs=outputs, more=len(more))))

asyncio.run(main())
"""
    told = await printed_by(program)
    for refusal in told["refusals"]:
        assert f"RLIMIT_NOFILE is {most}" in refusal
        assert "Too many open files" in refusal
    assert told["outputs"] == [f"{number}\n" for number in range(len(told["outputs"]))]
    assert len(told["outputs"]) > 4
    assert told["more"] == 1


async def test_room_is_made_for_sessions_as_far_as_it_goes() -> None:
    """The soft limit of open files is raised, up to the hard one; what then fits is told."""
    program = """
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1128))
fits = make_room(100), resource.getrlimit(resource.RLIMIT_NOFILE)
fits += make_room(1000), resource.getrlimit(resource.RLIMIT_NOFILE)
fits += make_room(1), resource.getrlimit(resource.RLIMIT_NOFILE)
print(json.dumps(dict(fits=fits)))
"""
    told = await printed_by("from tools.sandbox.room import make_room\n" + program)
    assert told["fits"] == [100, [628, 1128], 200, [1128, 1128], 1, [1128, 1128]]


@pytest.mark.parametrize("tier", ["NamespaceSandbox", "UnsafeSandbox"])
async def test_limits_that_the_host_does_not_allow_are_named(tier: str) -> None:
    """The code does not run with fewer open files than it was promised."""
    program = f"""
async def main():
    if {tier} is NamespaceSandbox:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    else:
        allow_files(100)
    sandbox = {tier}()
    end = await end_of(sandbox.run("1", limits=Limits(files=200)))
    fewer = await end_of(sandbox.run("1", limits=Limits(files=90)))
    await sandbox.close()
    print(json.dumps(dict(end=end, fewer=fewer)))

asyncio.run(main())
"""
    told = await printed_by(program)
    refusal = "RLIMIT_NOFILE: 200 are asked for, 100 allowed here"
    assert told == {"end": f"sandbox.setup_failed: {refusal}", "fewer": ["exit", 0, "1\n"]}


async def test_a_client_without_descriptors_fails_by_name(
    sandbox: NamespaceSandbox,
    descriptors_left: Callable[[int], contextlib.AbstractContextManager[None]],
) -> None:
    """However many lack: the call or run fails or is right, and nothing stays open."""
    limits = Limits(image_bytes=1000)
    session = await sandbox.open_session("python")
    gc.collect()  # descriptors of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    for left in range(12):
        for attempt in (
            lambda: sandbox.run("1", limits=limits),
            lambda: sandbox.open_session("python"),
            lambda: sandbox.open_session("bash"),
        ):
            with descriptors_left(left):
                end = await end_of(attempt())
            if isinstance(end, SandboxError):
                assert left < 11
                assert str(end).startswith("sandbox.client_failed: [Errno 24] Too many open files")
            else:
                assert left > 3
            if isinstance(end, JobSession):
                await end.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with descriptors_left(1), pytest.raises(SandboxError, match="client_failed"):
        await session.run("1")
    assert len(os.listdir("/proc/self/fd")) < before


async def end_of(work: Awaitable[object]) -> object:
    try:
        return await work
    except SandboxError as error:
        return error


def numbers(pid: int) -> list[str]:
    """Of a process, in all the namespaces that it is in."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return []
    return text.partition("NSpid:")[2].partition("\n")[0].split()


async def payload(server: psutil.Process, but: int = 0) -> int:
    """What runs the server's job or stands by: process 2 of a namespace in the server's; the other one than `but`."""
    async with asyncio.timeout(20):
        while True:
            for process in server.children(recursive=True):
                if process.pid != but and numbers(process.pid)[2:] == ["2"]:
                    return process.pid
            await asyncio.sleep(0.01)


async def test_an_end_before_the_code_begins_is_no_exit_code() -> None:
    """What kills it then is the host (as the kernel does that is short of memory); the call is begun once more."""
    before = psutil.Process().children()
    alone = NamespaceSandbox()
    await alone.run("1")
    (server,) = [process for process in psutil.Process().children() if process not in before]
    standing_by = await payload(server)
    os.kill(standing_by, signal.SIGSTOP)
    call = asyncio.ensure_future(alone.run("1"))
    await payload(server, but=standing_by)  # the next one stands by: this one has the call
    os.kill(standing_by, signal.SIGKILL)
    assert (await call).output == b"1\n"
    await alone.close()


async def test_a_docker_behind_a_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and with what to change."""
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:2375")
    with pytest.raises(SandboxError, match=r"no_docker: DOCKER_HOST is tcp://.*: only a unix"):
        DockerServer("python:3.11-slim", None)
