"""The `sql` tool: one read-only query on the database that the task names.

`public.extra.database` is a path (beginning at `root`), a name from `databases`, or a URL: sqlite://, duckdb://,
postgresql://.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta

from tools.errors import ToolError
from tools.function import tool
from tools.tool import Context, Observation, Options, Place
from tools.workers import Crashed, Late, Workers, open_workers

_GRACE_S = 2.0
"""For a child to say itself that the time is over."""


class SqlOptions(Options, frozen=True):
    """Where databases are."""

    root: str = ""
    """The folder where a task's relative path begins; by default the recipe's."""
    databases: dict[str, str] = {}
    """Names to paths or URLs; `env:NAME` takes the URL from an environment variable, as a password should."""
    max_rows: Annotated[int, Meta(ge=1)] = 50
    children: Annotated[int, Meta(ge=1)] = 4
    """Queries that one toolbox runs at once."""


class Databases:
    """The children that ask databases, and where these are."""

    def __init__(self, options: SqlOptions, recipe_dir: str, workers: Workers) -> None:
        self._options = options
        self._root = Path(recipe_dir, options.root)
        self._workers = workers

    def find(self, name: object) -> str:
        """The URL of what a task calls its database. Raises ToolError."""
        if not isinstance(name, str) or not name:
            raise ToolError("no_database", "the task's public.extra has no `database`")
        told = place = self._options.databases.get(name, name)
        if place.startswith("env:"):
            variable = place.removeprefix("env:")
            place = os.environ.get(variable, "")
            if not place:
                raise ToolError("no_database", f"the variable {variable} is not set")
        scheme = urlsplit(place).scheme
        if scheme in ("postgresql", "postgres"):
            return place
        path = self._root / place.removeprefix(f"{scheme}://")
        if not path.is_file():
            # what a variable holds may be a URL with a password, of a kind that is not known here
            raise ToolError("no_database", f"no file {path if told == place else told}")
        return f"{scheme or _kind(path)}://{path.resolve()}"

    async def ask(self, database: object, query: str, wall_s: float) -> Observation:
        """One query's result."""
        try:
            reply = await self._workers.call(
                wall_s + _GRACE_S,
                url=self.find(database),
                query=query,
                max_rows=self._options.max_rows,
                wall_s=wall_s,
            )
        except Late:
            return Observation(text=f"Timed out after {wall_s:g} s.", ok=False)
        except Crashed:
            return Observation(text="The database crashed on this query.", ok=False)
        if reply["failed"]:
            raise ToolError("database", reply["text"])
        return Observation(text=reply["text"], ok=reply["ok"])


@asynccontextmanager
async def open_databases(options: SqlOptions, place: Place) -> AsyncIterator[Databases]:
    """Around all queries of a process."""
    async with open_workers("tools.databases:ask", count=options.children) as workers:
        yield Databases(options, place.recipe_dir, workers)


@tool(options=SqlOptions, opens=open_databases, keep="head")
async def sql(context: Context, query: str) -> Observation:
    """Run one SQL query on the task's database and return its rows. The database is read-only.

    Args:
        query: One SELECT statement, in the database's own dialect.
    """
    databases: Databases = context.opened
    return await databases.ask(context.task.get("database"), query, context.limits.wall_s)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(16)
    return "duckdb" if head[8:12] == b"DUCK" else "sqlite"
