"""The `sql` tool: what a query sees, and what it cannot do, on each kind of database."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from bus.embedded import free_port
from tools.databases import _END, Table, render
from tools.errors import ToolError
from tools.registry import load_tools, open_tools
from tools.sandbox.sandbox import Limits, Outcome
from tools.tool import Context, Observation, Place

pytestmark = pytest.mark.asyncio(loop_scope="module")

Ask = Callable[..., Awaitable[Observation]]

ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t"


def contents(path: Path) -> bytes:
    return path.read_bytes()


async def no_sandbox(code: str, **_: Any) -> Outcome:
    raise AssertionError("sql runs no code")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ask() -> AsyncIterator[Ask]:
    """`await ask(query, database)`, in two children, at most three rows."""
    options = {
        "databases": {"shop": "env:TEST_SHOP_URL", "unset": "env:NO_SUCH_URL"},
        "max_rows": 3,
        "children": 2,
    }
    (sql,) = load_tools(["sql"], options={"sql": options}).values()

    async def query(text: str, database: object, wall_s: float = 20) -> Observation:
        database = str(database) if isinstance(database, Path) else database
        task = {"database": database} if database else {}
        context = Context(run=no_sandbox, limits=Limits(wall_s=wall_s), task=task)
        return await sql(context, {"query": text})

    async with open_tools([sql], Place(recipe_dir="/nowhere")):
        yield query


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A database of five books."""
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as link:
        link.execute(
            "CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT, price REAL, cover BLOB)"
        )
        rows = [(f"Book {n}", n * 1.5, bytes([n])) for n in range(5)]
        link.executemany("INSERT INTO book (title, price, cover) VALUES (?, ?, ?)", rows)
        link.execute("CREATE VIRTUAL TABLE text USING fts5(body)")
        link.execute("INSERT INTO text VALUES ('otters swim'), ('herons stand')")
        link.execute("CREATE VIEW cheap AS SELECT id FROM book WHERE price < 2")
    link.close()
    return path


@pytest.mark.parametrize(
    ("query", "text"),
    [
        (
            "SELECT id, title, price FROM book WHERE id < 3",
            "id | title | price\n------------------\n1 | Book 0 | 0.0\n2 | Book 1 | 1.5\n(2 rows)",
        ),
        ("SELECT id FROM book;", "id\n--\n1\n2\n3\n(the first 3 rows; there are more)"),
        ("SELECT id FROM book WHERE id > 9 -- none", "id\n--\n(0 rows)"),
        ("SELECT NULL AS a, x'00ff' AS b", "a | b\n-----\nNULL | x'00ff'\n(1 row)"),
        ("SELECT 'x' || char(10) || '\\' AS a", "a\n-\nx\\n\\\\\n(1 row)"),
        ("SELECT CAST(x'ff' AS TEXT) AS a", "a\n-\n\ufffd\n(1 row)"),
        ("SELECT sum(price) OVER (ORDER BY id) AS s FROM book LIMIT 1", "s\n-\n0.0\n(1 row)"),
        ("PRAGMA table_info(book)", "cid | name"),
        ("SELECT name FROM pragma_table_info('book') LIMIT 1", "name\n----\nid"),
        ("SELECT body FROM text WHERE text MATCH 'otters'", "otters swim"),
        ("SELECT value FROM json_each('[7]')", "7\n(1 row)"),
        ("SELECT max(id) AS m FROM cheap", "m\n-\n2"),
        ("EXPLAIN QUERY PLAN SELECT * FROM book", "SCAN book"),
    ],
)
async def test_a_query_shows_a_table_with_headers(
    ask: Ask, shop: Path, query: str, text: str
) -> None:
    """Names, rows, how many; a row is one line; bytes and NULL are told from text."""
    seen = await ask(query, shop)
    assert seen.ok
    assert text in seen.text


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM book",
        "INSERT INTO book (title) VALUES ('x') RETURNING id",
        "CREATE TABLE t (x)",
        "CREATE TEMP TABLE t (x)",
        "DROP TABLE book",
        "ATTACH '/tmp/other.sqlite' AS other",
        "ATTACH ':memory:' AS other",
        "VACUUM INTO 'copy.sqlite'",
        "UPDATE sqlite_master SET type = 'x'",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "PRAGMA database_list",
        "PRAGMA hard_heap_limit = 0",
        "SELECT load_extension('x')",
        "SELECT * FROM pragma_database_list",
        "BEGIN; DELETE FROM book; COMMIT",
        "BEGIN",
        "SELECT 1; SELECT 2",
        "SELECT nothing FROM nowhere",
        "",
        "SELECT '\x00'",
        "SELECT randomblob(1000000000)",
        "SELECT hex(zeroblob(100000000))",
    ],
)
async def test_nothing_but_reading_is_possible(ask: Ask, shop: Path, query: str) -> None:
    """Refused with the database's own words, and the file is as it was."""
    before = contents(shop)
    seen = await ask(query, shop)
    assert not seen.ok or seen.text == "(no result)"
    assert str(shop.parent) not in seen.text
    assert contents(shop) == before
    assert sorted(path.name for path in shop.parent.iterdir()) == ["shop.sqlite"]
    assert (await ask("SELECT count(*) AS n FROM book", shop)).text.startswith("n\n-\n5")


async def test_a_slow_query_ends_and_blocks_nobody(ask: Ask, shop: Path) -> None:
    """It is told that its time was over; others run beside it, in the same loop."""
    await asyncio.gather(
        *(ask("SELECT 1 AS one", shop) for _ in range(2))
    )  # both children are there
    slow = asyncio.create_task(ask(ENDLESS, shop, wall_s=3))
    quick = [await ask("SELECT 1 AS one", shop) for _ in range(3)]
    assert not slow.done()
    assert all(seen.ok for seen in quick)
    assert await slow == Observation(text="Timed out after 3 s.", ok=False)


async def test_a_query_in_one_long_step_is_killed(ask: Ask, shop: Path) -> None:
    """One that never asks for the time dies with its child, and the next query gets another."""
    query = "SELECT instr(hex(zeroblob(3000000)), hex(zeroblob(1000000)) || 'x')"
    seen = await ask(query, shop, wall_s=0.2)
    assert seen == Observation(text="Timed out after 0.2 s.", ok=False)
    assert (await ask("SELECT 1 AS one", shop)).ok


async def test_memory_is_capped(ask: Ask, shop: Path) -> None:
    """A query that sorts more than fits is told so; the toolbox lives on."""
    big = (
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t LIMIT 100000) "
        "SELECT hex(randomblob(4000)) AS h FROM t ORDER BY h"
    )
    seen = await ask(big, shop, wall_s=60)
    assert not seen.ok
    assert "memory" in seen.text


@pytest.mark.parametrize(
    ("database", "says"),
    [
        (None, "no `database`"),
        ("gone.sqlite", "no file .*gone.sqlite"),
        ("unset", "NO_SUCH_URL is not set"),
        (7, "no `database`"),
        ("oracle://x", "no file|no such kind"),
        ("junk.sqlite", "not a database"),
    ],
)
async def test_a_database_that_is_not_there_is_nobodys_query(
    ask: Ask, tmp_path: Path, database: object, says: str
) -> None:
    """Infrastructure, not an observation."""
    (tmp_path / "junk.sqlite").write_bytes(b"junk" * 999)
    if database == "junk.sqlite":
        database = tmp_path / "junk.sqlite"
    with pytest.raises(ToolError, match=says):
        await ask("SELECT 1", database)


@pytest.mark.timeout(60)  # it took years
async def test_the_end_of_a_statement_is_found_at_once() -> None:
    """Whatever comments it may be taken for."""
    for end in ("-- " * 1000, "/* */ " * 1000, "--;" * 1000, "/*;*/" * 1000):
        assert _END.sub("", f"SELECT 1;{end}\n") == "SELECT 1"
        assert _END.sub("", f"SELECT 1;{end}\n1") == f"SELECT 1;{end}\n1"


async def test_databases_have_names_and_urls(
    ask: Ask, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path, a URL, or a name that the recipe explains, from the environment if it says so."""
    monkeypatch.setenv("TEST_SHOP_URL", f"sqlite://{shop}")
    for database in ("shop", shop, f"sqlite://{shop}"):
        assert (await ask("SELECT count(*) AS n FROM book", database)).text == "n\n-\n5\n(1 row)"


async def test_an_unfinished_log_is_refused(ask: Ask, shop: Path) -> None:
    """Read as unchanging, the file would show old data."""
    link = sqlite3.connect(shop)
    link.execute("PRAGMA journal_mode = WAL")
    link.execute("DELETE FROM book")
    link.commit()
    with pytest.raises(ToolError, match="write-ahead log"):
        await ask("SELECT 1", shop)
    link.close()


# -- DuckDB ------------------------------------------------------------------------------------------


@pytest.fixture
def ducks(tmp_path: Path) -> Path:
    duckdb = pytest.importorskip("duckdb")
    path = tmp_path / "ducks.db"
    with duckdb.connect(str(path)) as link:
        link.execute("CREATE TABLE duck AS SELECT i AS id, 'duck ' || i AS name FROM range(5) t(i)")
    return path


async def test_duckdb_is_known_by_its_file(ask: Ask, ducks: Path) -> None:
    """Whatever it is called; the same table."""
    seen = await ask("SELECT id, name FROM duck ORDER BY id", ducks)
    assert seen.text.splitlines()[:3] == ["id | name", "---------", "0 | duck 0"]
    assert seen.text.endswith("(the first 3 rows; there are more)")


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM duck",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/*')",
        "COPY duck TO 'copy.csv'",
        "ATTACH 'other.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET memory_limit = '10GB'",
        "SELECT 1; DROP TABLE duck",
        "SELECT getenv('HOME')",
        "EXPORT DATABASE 'copy'",
        "SELEC 1",
        "",
    ],
)
async def test_duckdb_reaches_nothing_else(ask: Ask, ducks: Path, query: str) -> None:
    """No file, no network, no setting, no writing."""
    before = contents(ducks)
    seen = await ask(query, ducks)
    assert not seen.ok, seen.text
    assert contents(ducks) == before
    assert sorted(path.name for path in ducks.parent.iterdir()) == ["ducks.db"]


@pytest.mark.parametrize(
    ("query", "text"),
    [
        (
            "SELECT '2024-01-01 00:00:00+02'::timestamptz AS a, 1 AS a",
            "a | a\n-----\n2023-12-31 22:00:00+00 | 1",
        ),
        (
            "SELECT ['2024-01-01 00:00:00+02'::timestamptz] AS b; -- zones",
            "['2023-12-31 22:00:00+00']",
        ),
        ("WITH x AS (SELECT now() AS y) SELECT y IS NULL AS z FROM x", "False"),
        ("SELECT list(id ORDER BY id) AS l, {'k': 1} AS s FROM duck", "[0, 1, 2, 3, 4] | {'k': 1}"),
    ],
)
async def test_duckdb_shows_every_type(ask: Ask, ducks: Path, query: str, text: str) -> None:
    """Also those for which it would want another package."""
    seen = await ask(query, ducks)
    assert seen.ok
    assert text in seen.text


async def test_a_value_nested_too_deeply_is_told() -> None:
    """In its cell: DuckDB can make one, in seconds that this test does not wait for."""
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    text = render(Table(["a", "b"], [[nested, 1]]), 3)
    assert text == "a | b\n-----\n(nested too deeply) | 1\n(1 row)"


async def test_a_query_that_crashes_duckdb_is_a_bad_query(ask: Ask, ducks: Path) -> None:
    """Some of its recursions end with the stack, or with all memory: an observation, and the next query is answered."""
    seen = await ask(f"SELECT {'[' * 900}{']' * 900}", ducks, wall_s=60.0)
    assert not seen.ok
    assert "crashed" in seen.text or "Memory" in seen.text
    assert (await ask("SELECT count(*) AS n FROM duck", ducks)).text == "n\n-\n5\n(1 row)"


async def test_a_name_in_duckdb_is_no_variable_of_ours(ask: Ask, ducks: Path) -> None:
    """A table that is not there is not looked for among the program's own names."""
    seen = await ask("SELECT * FROM path", ducks)
    assert "does not exist" in seen.text
    assert "Python" not in seen.text


async def test_duckdb_ends_in_time(ask: Ask, ducks: Path) -> None:
    query = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range = 7"
    assert await ask(query, ducks, wall_s=0.5) == Observation(
        text="Timed out after 0.5 s.", ok=False
    )


# -- PostgreSQL --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of our own, without a password; yields host and port as a URL's part."""
    pytest.importorskip("psycopg")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed: its part of the sql tool is NOT tested here")
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    run_as = as_postgres if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if run_as:
        shutil.chown(folder, "postgres", "postgres")
    port = free_port()

    def run(program: str, *arguments: str) -> None:
        command = [*run_as, str(programs[-1] / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, timeout=100)

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "owner", "-A", "trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        for statement in (
            "CREATE ROLE reader LOGIN; CREATE TABLE fish (id int, name text)",
            "INSERT INTO fish SELECT i, 'fish ' || i FROM generate_series(1, 5) i",
            "GRANT ALL ON fish TO reader; GRANT CREATE ON SCHEMA public TO reader",
        ):
            at = ("-h", "127.0.0.1", "-p", str(port), "-U", "owner", "-d", "postgres")
            run("psql", *at, "-v", "ON_ERROR_STOP=1", "-c", statement)
        yield f"127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


async def test_postgresql_by_url(ask: Ask, server: str) -> None:
    """The same table."""
    seen = await ask("SELECT id, name FROM fish ORDER BY id;", f"postgresql://reader@{server}")
    assert seen.text.splitlines()[:3] == ["id | name", "---------", "1 | fish 1"]
    assert seen.text.endswith("(the first 3 rows; there are more)")
    assert (await ask("TABLE fish", f"postgres://reader@{server}")).ok


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM fish",
        "WITH d AS (DELETE FROM fish RETURNING 1) SELECT * FROM d",
        "SELECT 1; DELETE FROM fish",
        "SELECT 1; COMMIT; DELETE FROM fish",
        "COMMIT",
        "SET transaction_read_only = off",
        "SELECT set_config('transaction_read_only', 'off', false)",
        "SELECT set_config('transaction_read_only', 'off', true), lo_from_bytea(0, 'x')",
        "DO $$ BEGIN DELETE FROM fish; END $$",
        "CREATE TABLE t (x int)",
        "SELECT 1 INTO t",
        "SELECT * FROM fish FOR UPDATE",
        "COPY fish TO '/tmp/fish'",
        "COPY fish TO PROGRAM 'id'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT nextval('x')",
        "SELECT nothing",
        "",
        "SELECT '\x00'",
    ],
)
async def test_postgresql_is_only_read(ask: Ask, server: str, query: str) -> None:
    """Whatever rights its role has."""
    url = f"postgresql://reader@{server}"
    seen = await ask(query, url)
    assert not seen.ok, seen.text
    assert (await ask("SELECT count(*) AS n FROM fish", url)).text == "n\n-\n5\n(1 row)"


@pytest.mark.parametrize(
    "query",
    ["SELECT lo_creat(-1)", "SELECT lo_from_bytea(0, 'x')", "SELECT pg_advisory_lock(1)"],
)
async def test_postgresql_keeps_nothing(ask: Ask, server: str, query: str) -> None:
    """What its read-only transactions let through (in some versions) is taken back."""
    url = f"postgresql://reader@{server}"
    await ask(query, url)
    left = (
        "SELECT (SELECT count(*) FROM pg_largeobject_metadata) AS objects, "
        "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory') AS locks"
    )
    assert (await ask(left, url)).text.splitlines()[2] == "0 | 0"


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT chr(0)", "null character"),
        ("SELECT cursor_to_xml('answer', 1, true, true, '')", "cannot be run"),
        ("SELECT pg_terminate_backend(pg_backend_pid())", "terminating connection"),
        ("SELECT pg_cancel_backend(pg_backend_pid())", "canceling statement"),
    ],
)
async def test_what_a_query_brings_upon_itself_is_its_own(
    ask: Ask, server: str, query: str, says: str
) -> None:
    """No failure of the database: else a policy could leave a trajectory that goes badly."""
    seen = await ask(query, f"postgresql://reader@{server}")
    assert not seen.ok
    assert says in seen.text


@pytest.mark.parametrize("act", ["pg_terminate_backend", "pg_cancel_backend"])
async def test_a_query_that_another_one_ends_is_asked_again(
    ask: Ask, server: str, act: str
) -> None:
    """Trajectories share a role, and a role may end its own connections."""
    import psycopg

    url = f"postgresql://reader@{server}"
    with psycopg.connect(f"postgresql://owner@{server}") as holder:
        holder.execute("SELECT pg_advisory_lock(7)")
        victim = asyncio.ensure_future(
            ask("SELECT 'alive' AS a FROM pg_advisory_xact_lock(7)", url)
        )
        waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        ended = Observation(text="")
        while "True" not in ended.text:
            ended = await ask(f"SELECT {act}(pid) FROM ({waiting}) w", url)
    assert (await victim).text.splitlines()[2] == "alive"


@pytest.mark.parametrize(
    ("values", "row"),
    [
        ("'infinity'::date, '0044-03-15 BC'::date", "infinity | 0044-03-15 BC"),
        ("'24:00'::time, ARRAY['1 year'::interval]", '24:00:00 | {"1 year"}'),
        ("""'{"a": null}'::jsonb, '[1.0,true]'::json""", '{"a": null} | [1.0,true]'),
        ("""'"\\ud800"'::json, ARRAY['1e999'::json]""", '"\\\\ud800" | {1e999}'),
        ("('1' || repeat('0', 5000))::json IS NULL, true, '\\x00ff'::bytea", "False | True | x'00ff'"),
        ("ARRAY['NaN'::numeric, NULL], '-Infinity'::float8", "{NaN,NULL} | -Infinity"),
        ("int4range(1, 5), ARRAY[int4range(1, NULL)]", '[1,5) | {"[1,)"}'),
        ("ROW(1, 'x', NULL), ARRAY['10.0.0.1'::inet], '12.34'::money", "(1,x,) | {10.0.0.1} | $12.34"),
    ],
)  # fmt: skip
async def test_postgresql_shows_values_that_python_has_not(
    ask: Ask, server: str, values: str, row: str
) -> None:
    """As it writes them."""
    seen = await ask(f"SELECT {values}", f"postgresql://reader@{server}")
    assert seen.text.splitlines()[2] == row


@pytest.mark.parametrize("kind", ["json", "jsonb"])
async def test_a_value_nested_without_end_is_shown(ask: Ask, server: str, kind: str) -> None:
    """Nothing of it is parsed here."""
    query = f"SELECT (repeat('[', 2000) || repeat(']', 2000))::{kind} AS j"
    seen = await ask(query, f"postgresql://reader@{server}")
    assert seen.text == f"j\n-\n{'[' * 1000}…\n(1 row)"


async def test_postgresql_ends_in_time(ask: Ask, server: str) -> None:
    seen = await ask("SELECT pg_sleep(60)", f"postgresql://reader@{server}", wall_s=1)
    assert seen == Observation(text="Timed out after 1 s.", ok=False)


async def test_a_role_that_reaches_files_is_refused(ask: Ask, server: str) -> None:
    """A superuser's query could read the server's files and run its programs; so could no such server be asked."""
    with pytest.raises(ToolError, match="give the URL of another"):
        await ask("SELECT 1", f"postgresql://owner@{server}")
    with pytest.raises(ToolError, match="database"):
        await ask("SELECT 1", f"postgresql://nobody@127.0.0.1:{free_port()}/x", wall_s=2)
