"""The `visit` tool: a web page as text, a part at a time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.cookiejar import DefaultCookiePolicy
from typing import Annotated, NamedTuple

import httpx2
from msgspec import Meta

from tools.function import tool
from tools.tool import Context, Observation, Place
from tools.web import Fetcher, Refused, Remembered, WebOptions
from tools.workers import Late, Workers, open_workers


class VisitOptions(WebOptions, frozen=True):
    """How pages are shown, beside what may be fetched."""

    page_chars: Annotated[int, Meta(ge=100)] = 3000
    """Length of a part."""


class Page(NamedTuple):
    """A page as text."""

    url: str
    title: str
    text: str


class Reader:
    """Pages as text, remembered."""

    def __init__(self, fetcher: Fetcher, workers: Workers, cached: int) -> None:
        self._fetcher = fetcher
        self._workers = workers
        self._pages: Remembered[Page] = Remembered(cached)

    async def read(self, url: str, wall_s: float) -> Page:
        """The page. Raises Refused, TimeoutError, Late."""
        page = self._pages.get(url)
        if page is None:
            fetched = await self._fetcher.fetch(url, wall_s)
            found = await self._workers.call(
                wall_s,
                data=fetched.data,
                media_type=fetched.media_type,
                charset=fetched.charset,
                url=fetched.url,
            )
            page = Page(fetched.url, found["title"], found["text"])
            self._pages.keep(url, page)
        return page


@asynccontextmanager
async def open_reader(options: VisitOptions, _place: Place) -> AsyncIterator[Reader]:
    """Around all visits of a process."""
    async with (
        httpx2.AsyncClient(trust_env=False) as client,
        open_workers("tools.page:read_page", count=2) as workers,
    ):
        # what a site says to one trajectory is no business of another's
        client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))
        yield Reader(Fetcher(client, options), workers, options.cached)


@tool(options=VisitOptions, opens=open_reader, keep="head")
async def visit(context: Context, url: str, part: int = 1) -> Observation:
    """Read a web page as text. Long pages come in parts.

    Args:
        url: The page's address, beginning with http:// or https://.
        part: Which part of a long page, from 1.
    """
    reader: Reader = context.opened
    wall_s = context.limits.wall_s
    try:
        page = await reader.read(url, wall_s)
    except Refused as refused:
        return Observation(text=str(refused), ok=False)
    except (TimeoutError, Late):
        return Observation(text=f"Timed out after {wall_s:g} s.", ok=False)
    parts = split_parts(page.text, context.options.page_chars)
    if not 1 <= part <= len(parts):
        count = len(parts)
        return Observation(text=f"There is no part {part}: the page has {count}.", ok=False)
    title = f"{page.title}\n" if page.title else ""
    where = f" (part {part} of {len(parts)})" if len(parts) > 1 else ""
    return Observation(text=f"{title}{page.url}{where}\n\n{parts[part - 1]}")


def split_parts(text: str, max_chars: int) -> list[str]:
    """The text in parts, cut at an end of line where one is near; joined they are the text. At least one."""
    parts = []
    start = 0
    while len(text) - start > max_chars:
        end = text.rfind("\n", start + max_chars // 2, start + max_chars) + 1
        end = end or start + max_chars
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:] or ("" if parts else "(the page has no text)")]
