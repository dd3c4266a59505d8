"""The `web_search` tool: asks a search provider by its key.

The keys are in environment variables of the toolbox, and nowhere else.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, NamedTuple

import httpx2
import msgspec
from msgspec import Meta

from tools.errors import ToolError
from tools.function import tool
from tools.tool import Context, Observation, Options, Place
from tools.web import Remembered

_TRIES = 3
_MAX_RESULTS = 10
_MAX_QUERY_CHARS = 500
_AGAIN = {429, 500, 502, 503, 504}


class Hit(NamedTuple):
    """One page that was found."""

    title: str
    url: str
    snippet: str


class Provider(NamedTuple):
    """One provider's interface."""

    url: str
    key_variable: str
    ask: Callable[[str, int, str], dict[str, Any]]
    """Query, count and key → method, headers, and JSON or parameters."""
    read: Callable[[Any], list[Hit]]
    """The decoded answer → what was found. Raises KeyError, TypeError or AttributeError for another shape."""


PROVIDERS = {
    "serper": Provider(
        "https://google.serper.dev/search",
        "SERPER_API_KEY",
        lambda query, count, key: {
            "method": "POST",
            "headers": {"X-API-KEY": key},
            "json": {"q": query, "num": count},
        },
        lambda answer: [
            Hit(hit["title"], hit["link"], hit.get("snippet", ""))
            for hit in answer.get("organic", [])
        ],
    ),
    "tavily": Provider(
        "https://api.tavily.com/search",
        "TAVILY_API_KEY",
        lambda query, count, key: {
            "method": "POST",
            "headers": {"Authorization": f"Bearer {key}"},
            "json": {"query": query, "max_results": count},
        },
        lambda answer: [
            Hit(hit["title"], hit["url"], hit.get("content", "")) for hit in answer["results"]
        ],
    ),
    "brave": Provider(
        "https://api.search.brave.com/res/v1/web/search",
        "BRAVE_API_KEY",
        lambda query, count, key: {
            "method": "GET",
            "headers": {"X-Subscription-Token": key, "Accept": "application/json"},
            "params": {"q": query, "count": count},
        },
        lambda answer: [
            Hit(hit["title"], hit["url"], hit.get("description", ""))
            for hit in (answer.get("web") or {}).get("results", [])
        ],
    ),
}


class WebSearchOptions(Options, frozen=True):
    """Whom to ask."""

    provider: Literal["serper", "tavily", "brave"] = "serper"
    url: str = ""
    """Of another server with the provider's interface."""
    key_variable: str = ""
    """The environment variable with the key; by default SERPER_API_KEY, TAVILY_API_KEY or BRAVE_API_KEY."""
    at_once: Annotated[int, Meta(ge=1)] = 16
    """Requests that one toolbox has open."""
    cached: Annotated[int, Meta(ge=0)] = 10_000
    """Searches that one toolbox remembers."""


class Searcher:
    """Asks a provider, and remembers what it said."""

    def __init__(self, client: httpx2.AsyncClient, options: WebSearchOptions) -> None:
        """Raises ToolError if there is no key."""
        self._client = client
        self._provider = PROVIDERS[options.provider]
        self._url = options.url or self._provider.url
        variable = options.key_variable or self._provider.key_variable
        self._key = os.environ.get(variable, "")
        if not self._key:
            raise ToolError("no_key", f"web_search needs a key in the variable {variable}")
        self._free = asyncio.Semaphore(options.at_once)
        self._remembered: Remembered[list[Hit]] = Remembered(options.cached)

    async def find(self, query: str, count: int) -> list[Hit]:
        """What the provider finds. Raises ToolError if it cannot be asked, and TimeoutError."""
        hits = self._remembered.get((query, count))
        if hits is None:
            async with self._free:
                hits = self._read(await self._ask(query, count))[:count]
            self._remembered.keep((query, count), hits)
        return hits

    async def _ask(self, query: str, count: int) -> bytes:
        request = self._provider.ask(query, count, self._key)
        failure = ""
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(0.5 * 2**attempt)  # the provider asked for patience
            try:
                reply = await self._client.request(url=self._url, **request)
            except httpx2.TransportError as error:
                failure = str(error) or type(error).__name__
                continue
            if reply.is_success:
                return reply.content
            failure = f"status {reply.status_code}"
            if reply.status_code not in _AGAIN:
                break
        raise ToolError("search_provider", f"{self._url}: {failure}")

    def _read(self, data: bytes) -> list[Hit]:
        try:
            return self._provider.read(msgspec.json.decode(data))
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
            detail = f"{self._url} answered in no known shape: {error!r}"
            raise ToolError("search_provider", detail) from error


@asynccontextmanager
async def open_searcher(options: WebSearchOptions, _place: Place) -> AsyncIterator[Searcher]:
    """Around all searches of a process."""
    async with httpx2.AsyncClient(trust_env=False, timeout=None) as client:
        yield Searcher(client, options)


@tool(options=WebSearchOptions, opens=open_searcher, keep="head")
async def web_search(context: Context, query: str, limit: int = 5) -> Observation:
    """Search the web. Each result has a title, an address and a few lines; `visit` reads a page.

    Args:
        query: What to look for.
        limit: How many results, at most 10.
    """
    searcher: Searcher = context.opened
    query = " ".join(query.split())
    if not query or len(query) > _MAX_QUERY_CHARS:
        text = f"A query has 1 to {_MAX_QUERY_CHARS} characters."
        return Observation(text=text, ok=False)
    try:
        async with asyncio.timeout(context.limits.wall_s):
            hits = await searcher.find(query, min(max(limit, 1), _MAX_RESULTS))
    except TimeoutError as error:
        raise ToolError("search_provider", "no answer in time") from error
    if not hits:
        return Observation(text="Nothing was found.")
    texts = [
        f"{number}. {hit.title}\n{hit.url}\n{hit.snippet}".rstrip()
        for number, hit in enumerate(hits, 1)
    ]
    return Observation(text="\n\n".join(texts))
