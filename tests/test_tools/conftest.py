"""Fixtures of the tool tests: a real `ns` sandbox, and what an attack would go for."""

import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from tools.sandbox.ns import NamespaceSandbox


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[NamespaceSandbox]:
    """One fork server for a whole test file: a test that breaks it breaks the next ones."""
    opened = NamespaceSandbox()
    yield opened
    await opened.close()


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
