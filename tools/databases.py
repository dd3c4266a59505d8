"""Asks a database, blocking: runs in the children of tools/workers.py. Reading is all that a query can do there.

SQLite      the file is opened as unchanging and read-only, an authorizer refuses all but reading, memory is capped
DuckDB      read-only, its access to files and networks switched off for good
PostgreSQL  a read-only transaction as no superuser, never committed; the query is the body of a cursor, where only a
            SELECT can stand
"""

import contextlib
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

_MAX_CELL_CHARS = 1000
_SQLITE_MEMORY_BYTES = 256 << 20
_SQLITE_LENGTH = 8 << 20
_DUCKDB_MEMORY = "512MB"
_END = re.compile(r";(?:\s|--[^\n]*+|/\*.*?\*/)*+\Z", re.DOTALL)
"""Of a statement, with comments; each character is looked at once."""


class QueryError(Exception):
    """The query is wrong, or takes too long: for the policy to read."""


class DatabaseError(Exception):
    """The database cannot be asked: nobody's query is to blame."""


class Table(NamedTuple):
    """A query's result."""

    columns: list[str]
    rows: Sequence[Sequence[Any]]
    """At most one more than may be shown."""


def ask(url: str, query: str, max_rows: int, wall_s: float) -> dict[str, Any]:
    """`text` for the policy, `ok` if it is a result; `failed` if the database is to blame."""
    scheme, _, path = url.partition("://")
    readers: dict[str, Callable[[str, str, int, float], Table]] = {
        "sqlite": _ask_sqlite,
        "duckdb": _ask_duckdb,
        "postgres": _ask_postgresql,
        "postgresql": _ask_postgresql,
    }
    reader = readers.get(scheme)
    failed, ok = False, True
    try:
        if reader is None:
            raise DatabaseError(f"no such kind of database: {scheme}://")
        table = reader(url if reader is _ask_postgresql else path, query, max_rows + 1, wall_s)
        text = render(table, max_rows)
    except QueryError as error:
        text, ok = str(error), False
    except DatabaseError as error:
        text, failed = str(error), True
    except MemoryError:
        text, ok = "The query used too much memory.", False
    return {"text": text, "ok": ok, "failed": failed}


def render(table: Table, max_rows: int) -> str:
    """Column names, the rows, and how many there are."""
    if not table.columns:
        return "(no result)"
    lines = [" | ".join(_cell(name) for name in table.columns)]
    lines.append("-" * min(len(lines[0]), 80))
    lines += [" | ".join(_cell(value) for value in row) for row in table.rows[:max_rows]]
    count = len(table.rows)
    if count > max_rows:
        lines.append(f"(the first {max_rows} rows; there are more)")
    else:
        lines.append(f"({count} row{'' if count == 1 else 's'})")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes | bytearray | memoryview):
        text = f"x'{bytes(value[:_MAX_CELL_CHARS]).hex()}'"
    else:
        text = _text_of(value)
    text = text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
    return text if len(text) <= _MAX_CELL_CHARS else f"{text[:_MAX_CELL_CHARS]}…"


def _text_of(value: Any) -> str:
    try:
        return str(value)
    except RecursionError:  # DuckDB's lists and VARIANTs become Python's
        return "(nested too deeply)"


# -- SQLite ------------------------------------------------------------------------------------------

_READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_RECURSIVE,
}
_FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer"}
_DECLARING = (sqlite3.SQLITE_UPDATE, "sqlite_master")
"""What SQLite asks about when it declares a virtual table (json_each, FTS5), and never does."""
_PRAGMAS = {
    *("table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo"),
    *("foreign_key_list", "function_list", "collation_list", "compile_options"),
    "data_version",
}
"""Those that only describe."""


def _ask_sqlite(path: str, query: str, max_rows: int, wall_s: float) -> Table:
    log = Path(f"{path}-wal")
    if log.exists() and log.stat().st_size:
        raise DatabaseError(
            f"{path} has a write-ahead log that was not checkpointed: close it first"
        )
    deadline_s = time.monotonic() + wall_s
    try:
        link = sqlite3.connect(
            f"file:{quote(path)}?mode=ro&immutable=1", uri=True, isolation_level=None
        )
    except sqlite3.Error as error:
        raise DatabaseError(f"{path}: {error}") from error
    with contextlib.closing(link):
        _confine_sqlite(link, path)
        link.set_progress_handler(lambda: time.monotonic() > deadline_s, 10_000)
        try:
            cursor = link.execute(query)
            rows = cursor.fetchmany(max_rows)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            if time.monotonic() > deadline_s:
                raise QueryError(f"Timed out after {wall_s:g} s.") from error
            raise QueryError(f"Error: {error}") from error
        return Table([column[0] for column in cursor.description or ()], rows)


def _confine_sqlite(link: sqlite3.Connection, path: str) -> None:
    link.text_factory = lambda data: data.decode(errors="replace")
    for pragma in (
        "query_only = ON",
        "trusted_schema = OFF",
        "temp_store = MEMORY",
        "mmap_size = 0",
        f"hard_heap_limit = {_SQLITE_MEMORY_BYTES}",
    ):
        link.execute(f"PRAGMA {pragma}")
    try:
        link.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.DatabaseError as error:
        raise DatabaseError(f"{path}: {error}") from error
    for category, limit in (
        (sqlite3.SQLITE_LIMIT_LENGTH, _SQLITE_LENGTH),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 1 << 20),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
    ):
        link.setlimit(category, limit)
    link.set_authorizer(_authorize)


def _authorize(
    action: int, first: str | None, second: str | None, _database: str | None, _by: str | None
) -> int:
    allowed = (
        action in _READS
        or (action, first) == _DECLARING
        or (action == sqlite3.SQLITE_FUNCTION and second not in _FORBIDDEN_FUNCTIONS)
        or (action == sqlite3.SQLITE_PRAGMA and first in _PRAGMAS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


# -- DuckDB ------------------------------------------------------------------------------------------


def _ask_duckdb(path: str, query: str, max_rows: int, wall_s: float) -> Table:
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise DatabaseError("duckdb is not installed: `make setup` installs it") from error
    config: dict[str, Any] = {
        "memory_limit": _DUCKDB_MEMORY,
        "temp_directory": "",
        "threads": 1,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "python_enable_replacements": False,  # a table's name is none of our variables'
    }
    try:
        link = duckdb.connect(path, read_only=True, config=config)
        link.execute("SET enable_external_access = false")
        link.execute("SET lock_configuration = true")  # all of it stays as it is
    except duckdb.Error as error:
        raise DatabaseError(str(error)) from error
    with contextlib.closing(link), _interrupted(link.interrupt, wall_s) as late:
        try:
            statements = link.extract_statements(query)
            if len(statements) != 1:
                raise QueryError("Error: write one statement at a time.")
            answer = link.execute(_without_zones(link, statements[0]))
            columns = [column[0] for column in answer.description or ()]
            return Table(columns, answer.fetchmany(max_rows))
        except (duckdb.Error, UnicodeError, ValueError, OverflowError) as error:
            if late.is_set():
                raise QueryError(f"Timed out after {wall_s:g} s.") from error
            raise QueryError(f"Error: {error}") from error


def _without_zones(link: Any, statement: Any) -> Any:
    """The statement, in which times with a zone are text: duckdb makes no values of them unless pytz is installed."""
    import duckdb

    if statement.type.name != "SELECT":
        return statement
    try:
        columns = link.execute(f"DESCRIBE {statement.query}").fetchall()
    except duckdb.Error:
        return statement  # it says itself what is wrong with it
    if not any("TIME ZONE" in kind for _, kind, *_ in columns):
        return statement
    shown = (
        f"#{place}{'::VARCHAR' if 'TIME ZONE' in kind else ''} AS {_quoted(name)}"
        for place, (name, kind, *_) in enumerate(columns, 1)
    )
    return f"SELECT {', '.join(shown)} FROM (\n{_END.sub('', statement.query)}\n)"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def _interrupted(interrupt: Callable[[], None], wall_s: float) -> Iterator[threading.Event]:
    """Interrupt the block when its time is over; the event then says so."""
    late = threading.Event()

    def act() -> None:
        late.set()
        interrupt()

    timer = threading.Timer(wall_s, act)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()


# -- PostgreSQL --------------------------------------------------------------------------------------

_CUT_OFF_SHARE = 0.9
"""A query that is cancelled before this share of its time was cancelled by somebody."""
_SERVERS_FAULT = ("531", "532", "533", "58")
"""SQLSTATEs: no room, no memory, no connection left, and what the system did."""
_SHOWN_AS_ELSEWHERE = ("bool", "bytea")
"""All other values are shown as PostgreSQL writes them: it has times, numbers and JSON that Python has not."""


class _CutOff(Exception):
    """Another session of the same role, or the query itself, has ended the connection or cancelled the query."""


def _ask_postgresql(url: str, query: str, max_rows: int, wall_s: float) -> Table:
    """Asks again once when it was cut off: any query of the role may do that to another trajectory's."""
    with contextlib.suppress(_CutOff):
        return _ask_postgresql_once(url, query, max_rows, wall_s)
    try:
        return _ask_postgresql_once(url, query, max_rows, wall_s)
    except _CutOff as error:
        raise QueryError(f"Error: {error}") from error


def _ask_postgresql_once(url: str, query: str, max_rows: int, wall_s: float) -> Table:
    try:
        import psycopg
        from psycopg.types.string import TextLoader
    except ModuleNotFoundError as error:
        raise DatabaseError("psycopg is not installed: `make setup` installs it") from error
    wait_ms = int(wall_s * 1e3)
    settings = (
        f"-c default_transaction_read_only=on -c statement_timeout={wait_ms} "
        f"-c lock_timeout={wait_ms} -c idle_in_transaction_session_timeout={wait_ms}"
    )
    try:
        link = psycopg.connect(url, options=settings, connect_timeout=max(2, int(wall_s)))
    except psycopg.Error as error:
        raise DatabaseError(str(error)) from error
    # closed and not committed: what read-only lets through (large objects, NOTIFY) is taken back
    with contextlib.closing(link):
        for kind in link.adapters.types:
            link.adapters.register_loader(kind.array_oid, TextLoader)
            if kind.name not in _SHOWN_AS_ELSEWHERE:
                link.adapters.register_loader(kind.oid, TextLoader)
        begun_s = time.monotonic()
        try:
            _refuse_file_roles(link)
            with link.cursor("answer") as cursor:
                cursor.execute(query.strip().rstrip(";").encode())
                columns = [column.name for column in cursor.description or ()]
                return Table(columns, cursor.fetchmany(max_rows))
        except psycopg.errors.QueryCanceled as error:
            if time.monotonic() - begun_s < _CUT_OFF_SHARE * wall_s:
                raise _CutOff(str(error)) from error
            raise QueryError(f"Timed out after {wall_s:g} s.") from error
        except psycopg.errors.AdminShutdown as error:
            raise _CutOff(str(error)) from error
        except (psycopg.Error, ValueError) as error:
            told = str(error).strip()
            code = getattr(error, "sqlstate", None) or ""
            if link.closed or code.startswith(_SERVERS_FAULT):
                raise DatabaseError(told) from error
            raise QueryError(f"Error: {told}") from error


def _refuse_file_roles(link: Any) -> None:
    row = link.execute(
        "SELECT bool_or(rolsuper OR rolname IN ('pg_read_server_files', "
        "'pg_write_server_files', 'pg_execute_server_program')) FROM pg_roles "
        "WHERE pg_has_role(session_user, oid, 'MEMBER')"
    ).fetchone()
    if row is None or row[0]:
        raise DatabaseError("this role may reach the server's files: give the URL of another")
