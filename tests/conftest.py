"""A real nats-server for each test that asks for one (it starts in about 65 ms), and values of every schema.

`st.from_type(Turn)`, for any message, event or recipe, gives valid ones.
"""

import shutil
import subprocess
import typing
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.log import Log, open_log
from bus.provision import provision
from schemas import events, messages, recipe, task
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory

RUN = "test"

settings.register_profile("noisy", deadline=None)  # other processes have the processors too
settings.load_profile("noisy")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    embedded = EmbeddedServer(tmp_path / "nats")
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
def worker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/tool-worker-node with its packages, and a tool that also goes wrong."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: examples/tool-worker-node is not tested")
    here = Path(__file__).parent
    folder = tmp_path_factory.mktemp("worker") / "node"
    shutil.copytree(here.parent / "examples" / "tool-worker-node", folder)
    shutil.copy(here / "tool_workers" / "odd_word_count.mjs", folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return folder


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


for module in (events, messages, recipe, task):
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not Tokens:
            st.register_type_strategy(value, _structs)
st.register_type_strategy(Trajectory, _structs)
st.register_type_strategy(Tokens, _tokens)
