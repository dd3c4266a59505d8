"""The `docker` tier: a container for each call or session, by the docker SDK.

The container has no network, no capabilities, a read-only root and an ordinary user; the kernel counts its memory and
processes. The code's files are in /tmp, which lives as long as the container. `runtime="runsc"` puts gVisor's kernel
between the code and the host's. Slow to start beside `ns`: for hosts without namespaces, and images of their own.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from functools import partial
from importlib import resources
from typing import Any

from tools.errors import SandboxError
from tools.sandbox.docker_job import DockerJob
from tools.sandbox.job_sandbox import JobSandbox
from tools.sandbox.jobs import ENVIRONMENT, JobServer
from tools.sandbox.root import NOBODY
from tools.sandbox.sandbox import Limits
from tools.sandbox.world import SHARED_MEMORY_BYTES, most_files

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
_MORE_PROCESSES = 8
"""Of ours, beside the code's."""


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
        with contextlib.ExitStack() as on_error:
            leash, far_leash = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            own = []
            for one in (leash, far_leash):
                on_error.enter_context(one)
                one.setblocking(False)
            for fd in fds:
                own.append(os.dup(fd))
                on_error.callback(os.close, own[-1])
            on_error.pop_all()
        job = DockerJob(kind, limits, far_leash, own)
        task = asyncio.create_task(self._run(job))
        self._jobs.add(task)
        task.add_done_callback(partial(self._ended, job))
        return leash

    async def stop(self) -> None:
        """Remove every container."""
        for task in self._jobs:
            task.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await asyncio.to_thread(self._client.close)

    def _ended(self, job: DockerJob, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        job.close()  # here, since a task that is cancelled early runs nothing

    async def _run(self, job: DockerJob) -> None:
        started = time.monotonic()
        end: dict[str, Any]
        container = None
        try:
            container, stream = await self._started(job.limits)
            job.measure = partial(self._memory_bytes, container)
            end = await job.relay(stream)
            await asyncio.to_thread(container.reload)
            if container.attrs["State"].get("OOMKilled"):
                end["reason"] = "memory"
        except self._errors as error:
            end = {"error": str(error)}
        finally:
            if container:
                await asyncio.shield(asyncio.to_thread(self._remove, container))
        end["wall_ms"] = (time.monotonic() - started) * 1e3
        with contextlib.suppress(OSError):  # the client has gone
            job.leash.send(json.dumps(end).encode())

    async def _started(self, limits: Limits) -> tuple[Any, socket.socket]:
        """A container and its stream; when it is cancelled, what comes of it is removed again."""
        starting = asyncio.get_running_loop().run_in_executor(None, self._start, limits)
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            container, stream = await starting
            stream.close()
            await asyncio.to_thread(self._remove, container)
            raise

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
                "/tmp": f"size={limits.disk_bytes},nr_inodes={most_files(limits.disk_bytes)},mode=1777,exec"
            },
            shm_size=SHARED_MEMORY_BYTES,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            mem_limit=limits.memory_bytes + limits.disk_bytes,
            memswap_limit=limits.memory_bytes + limits.disk_bytes,
            pids_limit=limits.processes + _MORE_PROCESSES,
            ulimits=_ulimits(limits),
            environment={name: value for name, value in ENVIRONMENT.items() if name != "PATH"},
            log_config={"type": "none"},
            init=True,
            labels={LABEL: "1"},
            working_dir="/tmp",
        )
        try:
            return container, self._attach(container)
        except self._errors:
            self._remove(container)
            raise

    def _attach(self, container: Any) -> socket.socket:
        """The stream of a container that is started with it."""
        attached = self._client.api.attach_socket(
            container.id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        )
        raw = attached._sock  # the SDK hands out a file around it that does not close it
        try:
            container.start()
            stream = socket.socket(fileno=os.dup(raw.fileno()))
        finally:
            attached.close()
            raw.close()
        stream.setblocking(False)
        return stream

    def _memory_bytes(self, container: Any) -> int:
        try:
            taken = container.stats(stream=False, one_shot=True)["memory_stats"]
        except self._errors:  # it has just ended
            return 0
        return int(taken.get("usage", 0))

    def _remove(self, container: Any) -> None:
        with contextlib.suppress(*self._errors):  # it is gone already
            container.remove(force=True, v=True)


def _knock() -> None:
    """Raises OSError where no daemon listens; the SDK would find that out too, but lose a socket each time."""
    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    kind, _, path = address.partition("://")
    if kind != "unix":
        raise OSError(f"DOCKER_HOST is {address}: only a unix socket (unix:///…) carries the calls")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(path)


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
