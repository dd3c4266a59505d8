"""Logins and certificates as files, and a server of one's own that is started with them."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from actors.cli import main
from bus.connection import Endpoint, connect
from bus.embedded import EmbeddedServer, free_port
from bus.errors import Unreachable
from bus.log import open_log
from bus.logins import SYSTEM, BadLogin, Logins, new_logins, read_login, read_logins
from bus.permissions import covers
from bus.provision import provision
from bus.subjects import ROLES

NATS = shutil.which("nats-server", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def say(*arguments: str | Path) -> str:
    """What a command prints that must succeed."""
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[None]:
    """A server with the folder's configuration, once it answers."""
    with (folder / "log").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            str(NATS), "-c", str(folder / "nats.conf"), stdout=output, stderr=output
        )
    try:
        while "Server is ready" not in (folder / "log").read_text():
            assert process.returncode is None, (folder / "log").read_text()
            await asyncio.sleep(0.01)
        yield
    finally:
        process.kill()
        await process.wait()


def test_a_login_for_each_role_for_its_owner_only(tmp_path: Path) -> None:
    """`nats-conf` writes them once; made again, the configuration is new and the keys are the same."""
    say("nats-conf", tmp_path, "--host", "nats")
    files = {path.stem: path for path in tmp_path.glob("*.json")}
    assert set(files) == {*ROLES, SYSTEM}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}
    before = {role: read_login(path) for role, path in files.items()}
    text = (tmp_path / "nats.conf").read_text()
    assert not any(login.seed in text for login in before.values())
    say("nats-conf", tmp_path, "--host", "elsewhere", "--port", "4333")
    after = {role: read_login(path) for role, path in files.items()}
    assert {role: login.seed for role, login in after.items()} == {
        role: login.seed for role, login in before.items()
    }
    assert {login.url for login in after.values()} == {"nats://elsewhere:4333"}


async def test_a_server_of_ones_own_over_tls(tmp_path: Path) -> None:
    """`nats-certs` and `nats-conf` are all that it takes; clients that do not know its authority turn away."""
    say("nats-certs", tmp_path / "tls")
    port, monitor = str(free_port()), str(free_port())
    options = ("--tls", tmp_path / "tls", "--port", port, "--monitor", monitor)
    say("nats-conf", tmp_path, *options, "--store-limit", "1GB")
    logins = read_logins(str(tmp_path))
    async with serving(tmp_path):
        async with connect(logins.of("provision"), "test") as bus:
            await provision(bus, "test", ["python"])
            account = json.loads((await bus.request("$JS.API.INFO", b"")).data)
            assert account["limits"]["max_storage"] == 10**9
        async with connect(logins.of("generator"), "test") as bus:
            assert await bus.store("log.test.t.g0-0-0.turn", b"x") == 1
        say("nats-certs", tmp_path / "other")
        known = logins.of("generator")
        stranger = Endpoint(
            url=known.url, role=known.role, seed=known.seed, ca=str(tmp_path / "other" / "ca.pem")
        )
        with pytest.raises(Unreachable, match=r"(?i)certificate|no answer"):
            async with connect(stranger, "test"):
                pass
    authority = (tmp_path / "tls" / "ca.pem").read_bytes()
    say("nats-certs", tmp_path / "tls", "--host", "nats.example")
    assert (tmp_path / "tls" / "ca.pem").read_bytes() == authority
    assert (tmp_path / "tls" / "server.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "tls" / "ca.key").stat().st_mode & 0o777 == 0o600


async def test_a_wrong_key_is_one_clear_error(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    server.start()
    other = new_logins(server.logins.url).of("generator")
    with pytest.raises(Unreachable, match=r"(?i)authorization"):
        async with connect(other, "test"):
            pass
    server.stop()


def test_where_logins_are_read(tmp_path: Path) -> None:
    """A URL or a file serves for everything; a folder gives each role its own, and says which one is missing."""
    assert read_logins("nats://a:b@h:1").of("scorer") == Endpoint(
        url="nats://h:1", user="a", password="b"
    )
    new_logins("nats://h:1").write(tmp_path)
    one = read_logins(str(tmp_path / "scorer.json"))
    assert one.of("learner").role == "scorer"
    assert read_logins(str(tmp_path)).of("learner").role == "learner"
    (tmp_path / "learner.json").unlink()
    with pytest.raises(BadLogin, match=r"needs the file learner\.json"):
        read_logins(str(tmp_path)).of("learner")
    with pytest.raises(BadLogin, match="neither a URL"):
        read_logins(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("{", "not a login"),
        ('{"url": 1}', "not a login"),
        ('{"url": "nats://h", "role": "scorer", "seed": "S"}', "a seed that is none"),
        ('{"url": "nats://h", "role": "scorer", "ca": "ca.pem"}', r"make certs"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, written: str, says: str) -> None:
    path = tmp_path / "scorer.json"
    path.write_text(written)
    with pytest.raises(BadLogin, match=says) as error:
        read_login(path)
    assert str(path) in str(error.value)


def test_secrets_are_not_printed() -> None:
    """Neither a seed nor a password, in whatever holds a login."""
    logins = Logins({"scorer": Endpoint(url="nats://u:hidden@h:1", role="scorer", seed="SECRET")})
    assert "hidden" not in repr(logins)
    assert "SECRET" not in repr(logins)
    assert "nats://h:1" in repr(logins)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_login_or_a_clear_error(data: bytes) -> None:
    path = Path(tempfile.gettempdir()) / f"login-{os.getpid()}.json"
    path.write_bytes(data)
    with suppress(BadLogin):
        read_login(path)
    path.unlink()


_TOKENS = st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=4)


@given(_TOKENS, st.booleans(), st.lists(st.sampled_from("ab"), min_size=1, max_size=5))
def test_covers_is_what_the_server_matches(
    tokens: list[str], tail: bool, subject: list[str]
) -> None:
    """`*` is one token, `>` one or more at the end."""
    pattern = [*tokens, ">"] if tail else tokens
    long_enough = len(subject) > len(tokens) if tail else len(subject) == len(tokens)
    same = all(want in ("*", got) for want, got in zip(tokens, subject, strict=False))
    assert covers(".".join(pattern), ".".join(subject)) == (long_enough and same)


async def test_a_command_with_the_wrong_login_says_so_in_one_line(tmp_path: Path) -> None:
    """What an analytics login may not do ends with exit status 2, the role and the subject; what it may do works."""
    server = EmbeddedServer(tmp_path / "nats")
    server.start()
    async with connect(server.logins.of("provision"), "test") as bus:
        await provision(bus, "test", [])
    async with connect(server.logins.of("supervisor"), "test") as bus:
        await bus.store("log.test.r.opened", b"junk")
    server.logins.write(tmp_path / "logins")
    command = [sys.executable, "-m", "actors", "ps", "--run", "test"]
    login = str(tmp_path / "logins" / "analytics.json")
    done = await asyncio.to_thread(
        subprocess.run, [*command, "--nats", login], capture_output=True, text=True, timeout=60
    )
    server.stop()
    assert done.returncode == 2
    assert "actors: analytics may not subscribe to hb.*.*" in done.stderr
    assert server.logins.of("analytics").seed not in done.stderr + done.stdout


async def test_a_store_from_before_there_were_logins_is_kept(tmp_path: Path) -> None:
    """Its streams lie under the server's default account."""
    server = EmbeddedServer(tmp_path)
    server.start()
    async with connect(server.logins.of("provision"), "test") as bus:
        await provision(bus, "test", [])
    async with connect(server.logins.of("generator"), "test") as bus:
        await bus.store("log.test.t.g0-0-0.turn", b"x")
    server.stop()
    accounts = tmp_path / "jetstream"
    (accounts / "ACTORS").rename(accounts / "$G")
    server.start()
    async with connect(server.logins.of("analytics"), "test") as bus, open_log(bus, "test") as log:
        assert await log.last_seq() == 1
    server.stop()
