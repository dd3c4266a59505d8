"""Nothing secret is anywhere but in its place: a whole run is searched for what was planted in it."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet
import pytest

from actors.errors import RecipeError
from actors.recipe import load_recipe
from bus.connection import Endpoint

HERE = Path(__file__).parent
RECIPE = HERE / "planting" / "recipe.toml"
PLANTED = {
    "SERPER_API_KEY": "planted-key-52e0",
    "PLANTED_VARIABLE": "planted-variable-c4d8",
}
IN_ROWS = ("planted-answer-7f3a", "planted-rubric-91c2")
PASSWORD = "planted-password-8b1d"
PATIENCE_S = 300
MAY_HOLD = ("KV_private", "endpoint.json", "nats.conf")
"""Parts of the paths of files that are there to keep secrets, readable by their user alone."""


def actors(*arguments: str, runs: Path) -> "subprocess.CompletedProcess[bytes]":
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "actors", *arguments],
        env=os.environ | PLANTED | {"ACTORS_RUNS": str(runs), "ACTORS_LOG": "json"},
        capture_output=True,
        timeout=PATIENCE_S,
    )


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file, as somebody who has it can read it."""
    for path in folder.rglob("*"):
        if not path.is_file() or any(part in str(path.relative_to(folder)) for part in MAY_HOLD):
            continue
        if path.suffix == ".parquet":
            yield path, repr(pyarrow.parquet.read_table(path).to_pylist()).encode()
        else:
            yield path, path.read_bytes()


def keys_of(live: object) -> Iterator[str]:
    """What `endpoint.json` of a live run holds to be let in with."""
    if isinstance(live, dict):
        for name, value in live.items():
            if name in ("password", "seed") and value:
                yield str(value)
            yield from keys_of(value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_whole_run_keeps_its_secrets(tmp_path: Path) -> None:
    """Answers and tests of rows, even where a reward quotes them as it crashes; keys; what lets one in.

    Searched: the server's store but for the private bucket, logs, metrics, recipe, archive, TensorBoard, checkpoints,
    what every command printed, and what each replica tells Prometheus.
    """
    command = [sys.executable, "-m", "actors", "train", str(RECIPE), "--run", "planted"]
    environment = os.environ | PLANTED | {"ACTORS_RUNS": str(tmp_path), "ACTORS_LOG": "json"}
    folder = tmp_path / "planted"
    secrets = {*IN_ROWS, *PLANTED.values()}
    scraped: dict[str, bytes] = {}
    with (tmp_path / "output").open("wb") as output:
        run = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while run.poll() is None:
            time.sleep(0.5)  # between two looks
            for address in targets(tmp_path):
                try:
                    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                        scraped[address] = answer.read()
                except (OSError, http.client.HTTPException):
                    continue  # it has ended meanwhile
            with suppress(FileNotFoundError):
                secrets |= set(keys_of(json.loads((folder / "endpoint.json").read_bytes())))
    said = (tmp_path / "output").read_bytes()
    assert run.returncode == 0, said.decode()
    assert len(secrets) > len(IN_ROWS) + len(PLANTED), "what lets one in is known"
    for name in ("verify", "tail"):
        done = actors(name, "--run", "planted", *["--from-start"] * (name == "tail"), runs=tmp_path)
        (tmp_path / f"{name} printed").write_bytes(done.stdout + done.stderr)
    found = dict(contents(tmp_path)) | {Path(name): text for name, text in scraped.items()}
    assert any(path.suffix == ".parquet" for path in found)
    assert any("tfevents" in path.name for path in found)
    assert any(b"actors_hop_seconds" in text for text in scraped.values())
    log = b"".join(text for path, text in found.items() if "scorer" in path.name)
    assert b"ValueError at " in log, "the place of a crash is told"
    leaks = [
        (str(path), secret)
        for path, text in found.items()
        for secret in secrets
        if secret.encode() in text
    ]
    assert not leaks
    kept = [path for path in folder.rglob("*") if "KV_private" in str(path) and path.is_file()]
    assert any(IN_ROWS[0].encode() in path.read_bytes() for path in kept), (
        "the search would find it"
    )


def targets(runs: Path) -> list[str]:
    found = []
    for file in runs.glob("planted.*.targets.json"):
        with suppress(FileNotFoundError):  # it is removed at the end
            found += json.loads(file.read_bytes())[0]["targets"]
    return found


def test_commands_that_are_not_let_in_do_not_print_the_password(tmp_path: Path) -> None:
    """Nobody is there: they say where they looked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where = ("--nats", f"nats://me:{PASSWORD}@127.0.0.1:{port}")
    commands = [
        ("ps", "--run", "r"),
        ("tail", "--run", "r"),
        ("stop", "r"),
        ("train", str(RECIPE), "--run", "r"),
        ("run", "scorer", "--run", "r"),
    ]
    with ThreadPoolExecutor(len(commands)) as threads:  # each looks for some seconds
        runs = [threads.submit(actors, *each, *where, runs=tmp_path) for each in commands]
    for done in (run.result() for run in runs):
        said = done.stdout + done.stderr
        assert done.returncode == 2, said
        assert f"no NATS server at nats://127.0.0.1:{port}".encode() in said
        assert PASSWORD.encode() not in said
    assert not any(PASSWORD.encode() in text for _, text in contents(tmp_path))


@pytest.mark.parametrize(
    ("given", "url", "user", "password"),
    [
        ("nats://h:4222", "nats://h:4222", "", ""),
        ("nats://me:p%40ss@h:4222", "nats://h:4222", "me", "p@ss"),
        ("nats://me:p@ss/word@h", "nats://h", "me", "p@ss/word"),
        ("nats://token@h:4222", "nats://h:4222", "token", ""),
        ("me:secret@h:4222", "h:4222", "me", "secret"),
        ("nats://me:s@a:1,nats://me:s@b:2", "nats://a:1,nats://b:2", "me", "s"),
        ("tls://h:4222,tls://i:4222", "tls://h:4222,tls://i:4222", "", ""),
    ],
)
def test_an_address_can_be_printed(given: str, url: str, user: str, password: str) -> None:
    """Whatever an Endpoint is made of, its URL holds no credentials."""
    endpoint = Endpoint(url=given)
    assert (endpoint.url, endpoint.user, endpoint.password) == (url, user, password)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tools.options.mcp.servers.x.url", f"https://me:{PASSWORD}@example.org/mcp"),
        ("tools.options.mcp.servers.x.headers.Authorization", f"Bearer {PASSWORD}"),
        ("tools.options.mcp.servers.x.env.GITHUB_TOKEN", PASSWORD),
        ("tools.options.sql.databases.people", f"postgresql://me:{PASSWORD}@db/people"),
        ("policy.model", f"https://me:{PASSWORD}@hub/model"),
    ],
)
def test_a_recipe_with_a_secret_is_refused(key: str, value: str) -> None:
    """It would be in the log, in recipe.toml and in what --dry-run prints; the refusal names the key and the way."""
    with pytest.raises(RecipeError, match="env:NAME") as refused:
        load_recipe(RECIPE, [f'{key}="{value}"'])
    assert key in str(refused.value)
    assert PASSWORD not in str(refused.value)


def test_a_recipe_that_names_a_variable_is_taken() -> None:
    """That is how a tool gets its secret; what a tool's description quotes is none."""
    options = (
        'tools.options.mcp.servers.x.headers.Authorization="env:TICKETS"',
        'tools.options.mcp.listed="as in postgres://user:password@host"',
    )
    assert load_recipe(RECIPE, options).tools.options["mcp"]


def test_logs_hold_no_local_variables() -> None:
    """One JSON object a line, also of libraries and of crashes, with what is bound; a traceback shows places only."""
    code = f"""
import logging, warnings, structlog
from actors.logs import set_up_logging
set_up_logging("json")
structlog.contextvars.bind_contextvars(run="r", role="scorer")
logging.getLogger("some.library").warning("odd %s", "thing")
warnings.warn("old")
with structlog.contextvars.bound_contextvars(trajectory="g0-0-0", stage="score", attempt=2):
    try:
        answer = {PASSWORD!r}
        raise KeyError("place")
    except KeyError:
        structlog.get_logger().warning("crashed", exc_info=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["warning"] * 3
    assert "odd thing" in lines[0]["event"]
    assert all((line["run"], line["role"]) == ("r", "scorer") for line in lines)
    assert (lines[2]["trajectory"], lines[2]["stage"], lines[2]["attempt"]) == (
        "g0-0-0",
        "score",
        2,
    )
    assert lines[2]["exception"][0]["exc_type"] == "KeyError"
    assert "locals" not in done.stderr
    assert done.stdout == ""
