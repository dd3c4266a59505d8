"""A real nats-server for each test that asks for one (it starts in about 65 ms), and values of every schema.

`st.from_type(Turn)`, for any message, event or recipe, gives valid ones.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import msgspec
import psutil
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer, die_with_parent, free_port
from bus.log import Log, open_log
from bus.provision import provision
from schemas import algorithm, events, messages, recipe, task
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory

RUN = "test"

settings.register_profile("noisy", deadline=None)  # other processes have the processors too
settings.load_profile("noisy")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    embedded = EmbeddedServer(tmp_path / "nats", unrestricted=True)
    embedded.start()
    yield embedded
    embedded.stop()


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with connect(server.endpoint, "test") as connected:
        await provision(connected, RUN, ["python"])
        yield connected


@pytest.fixture
async def log(bus: Bus) -> AsyncIterator[Log]:
    async with open_log(bus, RUN) as opened:
        yield opened


@pytest.fixture(scope="session")
def npm_install() -> Callable[[Path], None]:
    """`npm_install(folder)`: the packages that its package.json names, from the network."""

    def install(folder: Path) -> None:
        command = [
            "npm",
            "install",
            "--no-audit",
            "--no-fund",
            "--no-package-lock",
            "--fetch-retries=5",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    return install


@pytest.fixture(scope="session")
def worker_folder(
    tmp_path_factory: pytest.TempPathFactory, npm_install: Callable[[Path], None]
) -> Path:
    """examples/tool-worker-node with its packages, and a tool that also goes wrong."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: examples/tool-worker-node is not tested")
    here = Path(__file__).parent
    folder = tmp_path_factory.mktemp("worker") / "node"
    shutil.copytree(here.parent / "examples" / "tool-worker-node", folder)
    shutil.copy(here / "tool_workers" / "odd_word_count.mjs", folder)
    npm_install(folder)
    return folder


@pytest.fixture(scope="session")
def http_serving() -> Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[str]]:
    """`with http_serving(Handler) as url:` a real server on the loopback interface, which logs nothing."""

    @contextmanager
    def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
        quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
        server = ThreadingHTTPServer(("127.0.0.1", 0), quiet)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()

    return serve


class PlainServer:
    """A nats-server without logins that can be killed and started again."""

    def __init__(self, folder: Path, name: str, blocks: str) -> None:
        port = free_port()
        self.name = name
        self.url = f"nats://127.0.0.1:{port}"
        binary = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"
        config = folder / f"{name}.conf"
        config.write_text(
            f'listen: "127.0.0.1:{port}"\nserver_name: {name}\nmax_payload: 8MB\n{blocks}\n'
        )
        self._command = [binary, "-c", str(config), "-l", str(folder / f"{name}.log")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, preexec_fn=die_with_parent)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def plain_servers(tmp_path: Path) -> Iterator[Callable[[str, str], PlainServer]]:
    """Start a server by its name and the blocks of its configuration; all end with the test."""
    started: list[PlainServer] = []

    def start(name: str, blocks: str) -> PlainServer:
        started.append(PlainServer(tmp_path, name, blocks))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def hub_and_leaf(tmp_path: Path, plain_servers) -> tuple[PlainServer, PlainServer]:
    """Two servers; the leaf has no streams of its own."""
    port = free_port()
    store = f'jetstream {{ store_dir: "{tmp_path / "store"}", domain: hub }}'
    hub = plain_servers("hub", f'{store}\nleafnodes {{ listen: "127.0.0.1:{port}" }}')
    remote = f'leafnodes {{ reconnect: "1s", remotes: [ {{ url: "nats://127.0.0.1:{port}" }} ] }}'
    here = 'mappings { "$JS.API.>": "$JS.hub.API.>" }'
    return hub, plain_servers("leaf", f"{remote}\n{here}")


# -- whole runs ------------------------------------------------------------------------------------

PATIENCE_S = 400.0
"""For what takes seconds on a machine that is not busy."""


class Machine:
    """Runs `actors` with a folder of its own for runs, and knows every process that comes of it."""

    def __init__(self, runs: Path, **environment: str) -> None:
        self.runs = runs
        self._environment = (
            os.environ | {"ACTORS_RUNS": str(runs), "COLUMNS": "200", "NATS_URL": ""} | environment
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """A command in a terminal of its own; its output and errors come together."""
        return subprocess.Popen(
            [sys.executable, "-m", "actors", *arguments],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def say(self, *arguments: str, timeout_s: float = PATIENCE_S) -> str:
        """What a command prints that must succeed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, output[-4000:]
        return output

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The metrics of the run's steps so far."""
        path = self.runs / run / "metrics.jsonl"
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        return [json.loads(line) for line in whole.splitlines()]

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Everything that is alive: replicas, servers, sandboxes; those whose command line has the part."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("ACTORS_RUNS") == str(self.runs)
                alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
                if ours and alive and part in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def until(self, is_so: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        """Wait for it."""
        end = time.monotonic() + patience_s
        while not is_so():
            assert time.monotonic() < end, f"not in {patience_s:g} s: {what}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def machine_at() -> Iterator[Callable[..., Machine]]:
    """A machine with its runs in a folder; what it leaves behind is killed in the end."""
    made: list[Machine] = []

    def make(runs: Path, **environment: str) -> Machine:
        made.append(Machine(runs, **environment))
        return made[-1]

    yield make
    for machine in made:
        for process in machine.processes():
            process.kill()


# -- values of every schema ------------------------------------------------------------------------

_TEXT = st.text(max_size=20)
_INT = st.integers(-(2**31), 2**31 - 1)
_FLOAT = st.floats(allow_nan=False, allow_infinity=False)
_ANY = st.recursive(
    st.none() | st.booleans() | _INT | _FLOAT | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    Any: _ANY,
    bool: st.booleans(),
    bytes: st.binary(max_size=20),
    float: _FLOAT,
    int: _INT,
    str: _TEXT,
    None: st.none(),
    type(None): st.none(),
}


def _values(annotation: Any, bounds: msgspec.Meta | None = None) -> st.SearchStrategy[Any]:
    """Values of a field's type, within the bounds that it is annotated with."""
    if annotation in (int, float) and bounds:
        low = bounds.ge if bounds.ge is not None else bounds.gt
        if annotation is int:
            return st.integers(low, bounds.le if bounds.le is not None else 2**31 - 1)
        return st.floats(low, bounds.le, exclude_min=bounds.gt is not None, allow_infinity=False)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], arguments[1])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(_values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(_values(arguments[0]), _values(arguments[1]), max_size=3)
    if origin in (UnionType, typing.Union):
        return st.one_of(*map(_values, arguments))
    return st.from_type(annotation)


def _structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    fields = msgspec.structs.fields(kind)
    return st.builds(kind, **{field.name: _values(field.type) for field in fields})


def _tokens(_: type[Tokens]) -> st.SearchStrategy[Tokens]:
    token = st.tuples(_INT, st.integers(0, 1), st.floats(width=32, allow_nan=False), _INT)

    def packed(tokens: list[tuple[int, int, float, int]]) -> Tokens:
        return Tokens.join(
            [
                Tokens.sampled([number], [logprob], [version])
                if sampled
                else Tokens.given([number])
                for number, sampled, logprob, version in tokens
            ]
        )

    return st.lists(token, max_size=8).map(packed)


for module in (algorithm, events, messages, recipe, task):
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not Tokens:
            st.register_type_strategy(value, _structs)
st.register_type_strategy(Trajectory, _structs)
st.register_type_strategy(Tokens, _tokens)


@pytest.fixture
def make_small_disk() -> Iterator[Callable[[Path, int], Path]]:
    """`make_small_disk(folder, megabytes)`: a file system of that size there."""
    with ExitStack() as mounts:

        def make(folder: Path, megabytes: int) -> Path:
            folder.mkdir(parents=True)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
            mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
            if mounted.returncode:
                pytest.skip(f"no small disk: mount says {mounted.stderr.strip()!r} (needs root)")
            mounts.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield make
