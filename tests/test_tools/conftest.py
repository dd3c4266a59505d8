"""Fixtures of the tool tests: a real `ns` sandbox, what an attack would go for, and a real site on this machine."""

import contextlib
import os
import resource
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from compose.stand_in import CannotRun, import_python, private_daemon
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits, Session, SessionKind
from tools.tool import Context


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[NamespaceSandbox]:
    """One fork server for a whole test file: a test that breaks it breaks the next ones."""
    opened = NamespaceSandbox()
    yield opened
    await opened.close()


@pytest_asyncio.fixture(loop_scope="module")
async def context(sandbox: NamespaceSandbox) -> AsyncIterator[Context]:
    """As a toolbox gives it: one session for the trajectory, opened when it is first needed."""
    opened: list[Session] = []

    async def session(kind: SessionKind) -> Session:
        if not opened or not opened[-1].alive:
            opened.append(await sandbox.open_session(kind))
        return opened[-1]

    yield Context(run=sandbox.run, limits=Limits(wall_s=1.0), task={}, session=session)
    for one in opened:
        await one.close()


@pytest.fixture(scope="session")
def docker_host() -> Iterator[None]:
    """A docker to speak to: the one that is there, or one of our own for as long as the tests run."""
    if "DOCKER_HOST" in os.environ or Path("/var/run/docker.sock").exists():
        yield
        return
    try:
        with private_daemon() as address, pytest.MonkeyPatch.context() as environment:
            import_python(address)
            environment.setenv("DOCKER_HOST", address)
            yield
    except CannotRun as error:
        pytest.skip(f"TIER docker NOT TESTED HERE: {error}")


class Targets(NamedTuple):
    """Things of this process that code in a sandbox must not reach."""

    private_file: Path
    public_file: Path
    tcp_port: int
    abstract_socket: str
    secret: str
    """The value of an environment variable."""


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Targets]:
    """Targets that are really there."""
    secret = secrets.token_hex(8)
    private_file, public_file = tmp_path / "private", tmp_path / "public"
    for path, mode in ((private_file, 0o600), (public_file, 0o644)):
        path.write_text(secret)
        path.chmod(mode)
    monkeypatch.setenv("TARGET_SECRET", secret)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{secret}")
        abstract.listen()
        yield Targets(private_file, public_file, tcp.getsockname()[1], secret, secret)


@pytest.fixture
def marker() -> str:
    """A word to find processes by, on their command line."""
    return f"marker-{secrets.token_hex(8)}"


def processes_with(word: str) -> list[int]:
    """Pids, as seen from here, of the processes with the word on their command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word.encode() in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
    return [pid for pid in found if pid != os.getpid()]


@pytest.fixture(name="processes_with")
def processes_with_fixture() -> object:
    """The function; pytest's importlib mode has no importable helpers."""
    return processes_with


@pytest.fixture
def descriptors_left() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """`with descriptors_left(2):` this process may open no more than two."""

    @contextlib.contextmanager
    def left(number: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        with contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + number + 1, hard))
            taken: list[int] = []
            with contextlib.suppress(OSError):  # there are no more
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for fd in taken[: len(taken) - number]:
                stack.callback(os.close, fd)
            for fd in taken[len(taken) - number :]:
                os.close(fd)
            yield

    return left


# -- a site ------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """What a site answers."""

    body: bytes = b""
    media_type: str = "text/html; charset=utf-8"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    endless: bool = False
    """The body again and again, until the client goes."""


class Asked(NamedTuple):
    """What a site was asked."""

    path: str
    headers: dict[str, str]
    body: bytes


class Site:
    """A real HTTP server on the loopback interface."""

    Reply = Reply

    url = ""
    """Known once it is started."""

    def __init__(self, answer: Callable[[Asked], Reply]) -> None:
        self.asked: list[Asked] = []
        self._answer = answer

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def handler(self) -> type[BaseHTTPRequestHandler]:
        all_asked, answer = self.asked, self._answer

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.path, headers, self.rfile.read(length))
                all_asked.append(asked)
                reply = answer(asked)
                self.send_response(reply.status)
                self.send_header("content-type", reply.media_type)
                for name, value in reply.headers:
                    self.send_header(name, value)
                if not reply.endless:
                    self.send_header("content-length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
                self.close_connection = reply.endless
                with contextlib.suppress(OSError):  # the client has had enough
                    while reply.endless:
                        self.wfile.write(reply.body)

            do_POST = do_GET

        return Handler


@pytest.fixture
def serve(http_serving) -> Iterator[Callable[[Callable[[Asked], Reply]], Site]]:
    """`serve(answer)` starts a site; `answer(asked)` makes its replies with `Site.Reply`."""
    with contextlib.ExitStack() as stack:

        def start(answer: Callable[[Asked], Reply]) -> Site:
            site = Site(answer)
            site.url = stack.enter_context(http_serving(site.handler()))
            return site

        start.Reply = Reply  # type: ignore[attr-defined]
        yield start
