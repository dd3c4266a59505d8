"""The `docker` tier: a container for each call or session, by the docker SDK (`pip install agentic-actors[docker]`).

The container has no network, no capabilities, a read-only root and an ordinary user; the kernel counts its memory and
processes. The code's files are in /tmp, which lives as long as the container. `runtime="runsc"` puts gVisor's kernel
between the code and the host's. Slow to start beside `ns`: for hosts without namespaces, and images of their own.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Annotated, Any

import msgspec

from tools.errors import SandboxError
from tools.sandbox.job_sandbox import JobSandbox
from tools.sandbox.jobs import ENVIRONMENT, JobServer
from tools.sandbox.root import NOBODY
from tools.sandbox.sandbox import Limits
from tools.sandbox.world import SHARED_MEMORY_BYTES

IMAGE = "python:3.11-slim"
LABEL = "agentic-actors.sandbox"
_MODULES = [
    "linux",
    "init",
    "seccomp",
    "shell",
    "root",
    "batch",
    "world",
    "cell",
    "session_cells",
    "payload",
    "relay",
]
_BOOTSTRAP = """
import json, sys, types
for name in ("tools", "tools.sandbox"):
    sys.modules[name] = types.ModuleType(name)
for name, source in json.loads(sys.argv[1]).items():
    module = sys.modules["tools.sandbox." + name] = types.ModuleType("tools.sandbox." + name)
    setattr(sys.modules["tools.sandbox"], name, module)
    exec(compile(source, name, "exec"), module.__dict__)
sys.modules["tools.sandbox.relay"].main()
"""
_CHUNK_BYTES = 1 << 16
_FRAME_BYTES = 1 << 20
_CALL_DESCRIPTORS = 8


class DockerServer(JobServer):
    """Starts a container for each job and carries the job's descriptors to it."""

    died = "container_died"

    def __init__(self, image: str, runtime: str | None) -> None:
        """Raises SandboxError when there is no docker to speak to."""
        try:
            import docker
        except ImportError as error:
            raise SandboxError("no_docker", "the docker SDK is not installed") from error
        self._image = image
        self._runtime = runtime
        self._errors: tuple[type[Exception], ...] = (docker.errors.DockerException, OSError)
        self._jobs: set[asyncio.Task[None]] = set()
        try:
            _knock()
            self._client = docker.from_env()
        except self._errors as error:
            raise SandboxError("no_docker", str(error)) from error

    @property
    def dead(self) -> bool:
        """See JobServer: the daemon outlives its clients."""
        return False

    def give_up(self) -> None:
        """See JobServer: the container goes with its leash."""

    async def begin(self, kind: str, limits: Limits, fds: Sequence[int]) -> socket.socket:
        """See JobServer."""
        leash, far_leash = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        leash.setblocking(False)
        far_leash.setblocking(False)
        own = [os.dup(fd) for fd in fds]
        job = _Job(kind, limits, far_leash, own)
        task = asyncio.create_task(self._run(job))
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return leash

    async def stop(self) -> None:
        """Remove every container."""
        for task in self._jobs:
            task.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await asyncio.to_thread(self._client.close)

    async def _run(self, job: "_Job") -> None:
        started = time.monotonic()
        end: dict[str, Any]
        container = None
        try:
            container, stream = await asyncio.to_thread(self._start, job.limits)
            end = await job.relay(stream)
            await asyncio.to_thread(container.reload)
            if container.attrs["State"].get("OOMKilled"):
                end["reason"] = "memory"
        except self._errors as error:
            end = {"error": str(error)}
        finally:
            if container:
                await asyncio.shield(asyncio.to_thread(self._remove, container))
            job.close()
        with contextlib.suppress(OSError):  # the client has gone
            job.leash.send(
                json.dumps(end | {"wall_ms": (time.monotonic() - started) * 1e3}).encode()
            )
        job.leash.close()

    def _start(self, limits: Limits) -> tuple[Any, socket.socket]:
        container = self._client.containers.create(
            self._image,
            ["python3", "-I", "-c", _BOOTSTRAP, _bundle()],
            runtime=self._runtime,
            stdin_open=True,
            user=f"{NOBODY}:{NOBODY}",
            network_mode="none",
            read_only=True,
            tmpfs={
                "/tmp": f"size={limits.disk_bytes},nr_inodes={max(8192, limits.disk_bytes // 8192)},mode=1777,exec"
            },
            shm_size=SHARED_MEMORY_BYTES,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            mem_limit=limits.memory_bytes + limits.disk_bytes,
            memswap_limit=limits.memory_bytes + limits.disk_bytes,
            pids_limit=limits.processes + _CALL_DESCRIPTORS,
            ulimits=_ulimits(limits),
            environment={name: value for name, value in ENVIRONMENT.items() if name != "PATH"},
            log_config={"type": "none"},
            init=True,
            labels={LABEL: "1"},
            working_dir="/tmp",
        )
        attached = self._client.api.attach_socket(
            container.id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        )
        container.start()
        raw = attached._sock  # the SDK hands out a file around it that does not close it
        stream = socket.socket(fileno=os.dup(raw.fileno()))
        attached.close()
        raw.close()
        stream.setblocking(False)
        return container, stream

    def _remove(self, container: Any) -> None:
        with contextlib.suppress(*self._errors):  # it is gone already
            container.remove(force=True, v=True)


def _knock() -> None:
    """Raises OSError where no daemon listens; the SDK would find that out too, but lose a socket each time."""
    kind, _, path = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").partition("://")
    if kind == "unix":
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)


class _Job:
    """The descriptors of one job, and both ends of what goes over the container's stream."""

    def __init__(self, kind: str, limits: Limits, leash: socket.socket, fds: list[int]) -> None:
        self.limits = limits
        self.leash = leash
        self._kind = kind
        self._output_fd, *self._fds = fds
        self._killed = asyncio.Event()
        self._reason = "exit"

    def close(self) -> None:
        """Let the descriptors go: their readers see the end."""
        for fd in (self._output_fd, *self._fds):
            os.close(fd)

    async def relay(self, stream: socket.socket) -> dict[str, Any]:
        """Carry everything both ways until the job ends; how it did."""
        loop = asyncio.get_running_loop()
        with stream:
            await self._send_job(stream)
            loop.add_reader(self.leash, self._killed_or, stream)
            end: dict[str, Any] = {"exit_code": -9}
            wall_s = self.limits.wall_s if self._kind == "call" else self.limits.session_s
            try:
                async with asyncio.timeout(wall_s), asyncio.TaskGroup() as tasks:
                    pump = tasks.create_task(self._pump_out(stream))
                    requests = tasks.create_task(self._pump_in(stream))
                    killed = tasks.create_task(self._killed.wait())
                    await asyncio.wait({pump, killed}, return_when=asyncio.FIRST_COMPLETED)
                    if pump.done():
                        end = pump.result()
                    for task in (pump, requests, killed):
                        task.cancel()
            except TimeoutError:
                self._reason = "wall"
            finally:
                loop.remove_reader(self.leash)
        return end | {"reason": self._reason}

    async def _send_job(self, stream: socket.socket) -> None:
        job = {"kind": self._kind, "limits": msgspec.to_builtins(self.limits)}
        await _send(stream, "job", msgspec.json.encode(job))
        if self._kind == "call":
            await _send(stream, "files", *map(_content, self._fds[:2]))

    def _killed_or(self, stream: socket.socket) -> None:
        try:
            message = self.leash.recv(64)
        except OSError:
            message = b""
        if message == b"interrupt":
            frame = json.dumps({"of": "interrupt", "sizes": []}).encode() + b"\n"
            with contextlib.suppress(OSError):  # it is just ending
                stream.send(frame)
        elif message == b"memory":
            self.leash.send(b'{"memory_bytes": 0}')
        else:
            self._reason = "killed"
            self._killed.set()
            asyncio.get_running_loop().remove_reader(self.leash)

    async def _pump_in(self, stream: socket.socket) -> None:
        """Requests of a session."""
        loop = asyncio.get_running_loop()
        if self._kind == "call":
            return
        fd = self._fds[0]
        os.set_blocking(fd, False)
        ready = asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            while True:
                await ready.wait()
                ready.clear()
                try:
                    content = (
                        _request(fd) if self._kind == "python" else [os.read(fd, _CHUNK_BYTES)]
                    )
                except BlockingIOError:
                    continue  # it has been read
                if not content[0]:
                    return
                await _send(stream, "channel" if self._kind == "python" else "lines", *content)
        finally:
            loop.remove_reader(fd)

    async def _pump_out(self, stream: socket.socket) -> dict[str, Any]:
        """Output and answers; returns how the job ended. Nothing that comes is believed."""
        answers_fd = self._fds[-1]
        async for of, content in _frames(stream):
            if of == "output":
                await _write(self._output_fd, content)
            elif of == "answers" and (self._kind != "call" or len(self._fds) > 2):
                await _write(answers_fd, content)
            elif of == "end":
                with contextlib.suppress(*_GARBAGE):
                    exit_code = msgspec.json.decode(content, type=_End).exit_code
                    return {"exit_code": max(-64, min(exit_code, 255))}
        return {"exit_code": -9}


async def _frames(stream: socket.socket) -> AsyncIterator[tuple[str, bytes]]:
    """What the relay sends, out of what docker makes of its stdout; ends where it is not that."""
    reader, writer = await asyncio.open_unix_connection(sock=stream.dup())
    received = bytearray()
    try:
        while True:
            head = await reader.readexactly(8)
            kind, size = struct.unpack(">BxxxI", head)
            content = await reader.readexactly(size)
            if kind != 1:
                continue  # its stderr: a relay that fails
            received += content
            while b"\n" in received[:_CHUNK_BYTES]:
                line, _, rest = received.partition(b"\n")
                try:
                    header = msgspec.json.decode(line, type=_Header)
                except _GARBAGE:
                    return
                if header.size > _FRAME_BYTES or len(rest) < header.size:
                    break
                yield header.of, bytes(rest[: header.size])
                received = rest[header.size :]
            if len(received) > 2 * _FRAME_BYTES:
                return
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


_GARBAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises: the code may write anything there."""


class _End(msgspec.Struct):
    exit_code: int


class _Header(msgspec.Struct):
    of: str
    size: Annotated[int, msgspec.Meta(ge=0)] = 0


async def _send(stream: socket.socket, of: str, *content: bytes) -> None:
    header = json.dumps({"of": of, "sizes": [len(one) for one in content]}).encode()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just ended
        await loop.sock_sendall(stream, b"".join([header, b"\n", *content]))


async def _write(fd: int, content: bytes) -> None:
    """To a pipe or socket that this process reads itself, so it is never full for long."""
    rest = memoryview(content)
    os.set_blocking(fd, False)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            await asyncio.sleep(0)  # its reader runs in this loop
        except OSError:
            return  # nobody reads any more


def _request(channel_fd: int) -> list[bytes]:
    """A message and what is in its files."""
    with socket.socket(fileno=os.dup(channel_fd)) as channel:
        message, fds, _, _ = socket.recv_fds(channel, _CHUNK_BYTES, _CALL_DESCRIPTORS)
    content = [message, *map(_content, fds)]
    for fd in fds:
        os.close(fd)
    return content


def _content(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def _bundle() -> str:
    folder = resources.files("tools.sandbox")
    return json.dumps({name: (folder / f"{name}.py").read_text("utf-8") for name in _MODULES})


def _ulimits(limits: Limits) -> list[Any]:
    from docker.types import Ulimit

    return [
        Ulimit(name=name, soft=value, hard=value)
        for name, value in (
            ("fsize", limits.file_bytes),
            ("nofile", limits.files),
            ("core", 0),
        )
    ]


class DockerSandbox(JobSandbox):
    """Calls and sessions in containers."""

    tier = "docker"

    def __init__(self, image: str = IMAGE, runtime: str | None = None) -> None:
        """Raises SandboxError (`no_docker`) when there is no docker to speak to."""
        super().__init__(DockerServer(image, runtime))
