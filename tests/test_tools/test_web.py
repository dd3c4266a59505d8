"""`visit` and `web_search` against a real server on this machine, and what they refuse to reach."""

import encodings.aliases
import gzip
import json
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.errors import ToolError
from tools.page import read_page
from tools.registry import load_tools, open_tools
from tools.sandbox.sandbox import Limits, Outcome
from tools.tool import Context, Observation, Place
from tools.visit import split_parts
from tools.web import is_public

PAGE = """<!doctype html><html><head><title> A
 page </title><style>p {}</style></head><body><nav>menu</nav><main><h1>Otters &amp; more</h1>
<p>They <b>swim</b>
well. <a href="/deep?x=1">More</a></p><script>evil()</script><ul><li>one</li><li>two</li></ul>
<pre>a
  b</pre><table><tr><td>1</td><td>2</td></tr></table><img alt="a river"></main><footer>legal</footer>"""
TEXT = """# Otters & more

They swim well. [More]({url}/deep?x=1)

- one
- two

a
  b

 | 1 | 2

[image: a river]"""


async def no_sandbox(code: str, **_: Any) -> Outcome:
    raise AssertionError("runs no code")


@asynccontextmanager
async def opened(
    name: str, wall_s: float = 20, **options: Any
) -> AsyncIterator[Callable[..., Any]]:
    (tool,) = load_tools([name], options={name: options}).values()

    async def call(**arguments: Any) -> Observation:
        context = Context(run=no_sandbox, limits=Limits(wall_s=wall_s), task={})
        return await tool(context, arguments)

    async with open_tools([tool], Place()):
        yield call


def paths(site: Any) -> list[str]:
    return [asked.path for asked in site.asked]


# -- pages -------------------------------------------------------------------------------------------


async def test_a_page_is_shown_as_text(serve: Any) -> None:
    """Its main part with headings, lists and links; once fetched it is remembered."""
    site = serve(
        lambda asked: (
            serve.Reply(PAGE.encode()) if asked.path == "/page" else serve.Reply(status=404)
        )
    )
    async with opened("visit", private_hosts=["127.0.0.1"]) as visit:
        seen = await visit(url=f"{site.url}/page#part")
        assert seen.ok
        assert seen.text == f"A page\n{site.url}/page\n\n{TEXT.format(url=site.url)}"
        assert await visit(url=f"{site.url}/page#part") == seen
        assert paths(site) == ["/robots.txt", "/page"]
        assert site.asked[1].headers["user-agent"] == "agentic-actors"
        assert site.asked[1].headers["host"] == f"127.0.0.1:{site.port}"
        missing = await visit(url=f"{site.url}/gone")
        assert missing == Observation(text=f"{site.url}/gone answers with status 404.", ok=False)


async def test_a_site_s_cookies_are_not_kept(serve: Any) -> None:
    """They would be sent with another trajectory's visits."""
    site = serve(lambda _: serve.Reply(b"hello", headers=(("set-cookie", "who=first; Path=/"),)))
    async with opened("visit", private_hosts=["127.0.0.1"], robots=False) as visit:
        for page in ("a", "b"):
            assert (await visit(url=f"{site.url}/{page}")).ok
    assert [asked.headers.get("cookie") for asked in site.asked] == [None, None]


async def test_a_long_page_comes_in_parts(serve: Any) -> None:
    """Which say how many there are; together they are the page."""
    text = "\n".join(f"line {n}" for n in range(100))
    site = serve(lambda _: serve.Reply(text.encode(), "text/plain"))
    async with opened("visit", private_hosts=["127.0.0.1"], page_chars=300, robots=False) as visit:
        first = await visit(url=site.url)
        assert first.text.startswith(f"{site.url} (part 1 of 3)\n\nline 0\n")
        bodies = [(await visit(url=site.url, part=n)).text.partition("\n\n")[2] for n in (1, 2, 3)]
        assert "".join(bodies) == text
        assert (await visit(url=site.url, part=4)).text == "There is no part 4: the page has 3."
    assert paths(site) == ["/"]


@given(st.text(), st.integers(1, 40))
def test_parts_are_the_text(text: str, max_chars: int) -> None:
    parts = split_parts(text, max_chars)
    assert "".join(parts) == (text or "(the page has no text)")
    assert not text or all(0 < len(part) <= max_chars for part in parts)


@given(
    st.text()
    | st.lists(st.sampled_from(["<p>", "</p>", "<pre>", "<a href=x>", "<li>", "x", " ", "<!--"]))
)
def test_any_page_is_text(html: str | list[str]) -> None:
    """However broken; visible words stay."""
    page = read_page("".join(html).encode(), "text/html", "", "http://x/")
    assert isinstance(page["text"], str)


CHARSETS = st.sampled_from(sorted({*encodings.aliases.aliases.values(), "idna", "undefined", ""}))
BITS = st.sampled_from(
    [
        *(b"<meta charset=utf-7>", b"<meta charset=undefined>", b"+2AA-", b"\\ud800", b"&#xd800;"),
        *(b"<title>", b"</title>", b"<svg>", b"<nav>", b"<template>", b"<main>", b"<pre>", b"\0"),
        *(b"<a href='http://[domain]/x'>", b"<a href=//[>", b"<img alt='", b"'>", b"<td>", b"\xff"),
        *("<a href=http://\u2100/>".encode(), b"<p " + b"a" * 9000 + b">", b"<b>" * 3000, b"x"),
    ]
)


@given(
    data=st.binary() | st.lists(BITS).map(b"".join),
    charset=st.text() | CHARSETS,
    media_type=st.sampled_from(["text/html", "text/plain"]),
)
def test_any_bytes_are_text(data: bytes, charset: str, media_type: str) -> None:
    """In any character set: text that a message can carry."""
    msgspec.msgpack.encode(read_page(data, media_type, charset, "http://x/"))


def test_links_are_no_longer_than_links_are() -> None:
    """Each takes in the page's own, which the policy may have made as long as it likes."""
    page = b"<a href=x>y</a>" * 5_000
    assert len(read_page(page, "text/html", "", f"http://h/{'a' * 60_000}/")["text"]) < 20_000


def test_a_link_that_leads_nowhere_is_its_words() -> None:
    """As in documentation that says `http://[domain]/x`."""
    page = b"<a href='http://[domain]/x'>there</a> <a href=/x>here</a>"
    assert read_page(page, "text/html", "", "http://x/")["text"] == "there [here](http://x/x)"


def test_a_page_nested_without_end_is_text() -> None:
    """No recursion."""
    page = read_page(b"<div>" * 20_000 + b"word", "text/html", "", "http://x/")
    assert page["text"] == "word"


@pytest.mark.parametrize(
    ("data", "charset"),
    [
        ("<p>né".encode("latin-1"), "latin-1"),
        ('<meta charset="latin-1"><p>né'.encode("latin-1"), ""),
        ("<p>né".encode(), "no-such-charset"),
        ("<p>né".encode(), "undefined"),
        ('<meta charset="idna"><p>né'.encode(), ""),
        ("<p>né".encode(), ""),
    ],
)
def test_characters_are_read_as_they_were_written(data: bytes, charset: str) -> None:
    """By the header, by the page's own word, else UTF-8."""
    assert read_page(data, "text/html", charset, "http://x/")["text"] == "né"


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://[64:ff9b::7f00:1]:{port}/",
        "http://0.0.0.0:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f.1:{port}/",
        "http://127.1:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "http://user:password@127.0.0.1:{port}/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "gopher://127.0.0.1:{port}/",
        "data:text/html,x",
        "http://",
        "http:///x",
        "//127.0.0.1/",
        "no url",
        "http://a b/",
        "http://no-such-host.invalid/",
        "http://xn--a.-/",
        "http://127.0.0.1:99999/",
        "http://[domain]/",
        "",
    ],
)
async def test_private_places_are_not_reached(serve: Any, url: str) -> None:
    """However they are written: told in a line, and no request leaves."""
    site = serve(lambda _: serve.Reply(b"secret"))
    async with opened("visit", wall_s=60) as visit:
        seen = await visit(url=url.format(port=site.port))
    assert not seen.ok
    assert "secret" not in seen.text
    assert site.asked == []


async def test_a_redirect_is_checked_anew(serve: Any) -> None:
    """A host that may be visited cannot lead to one that may not; redirects end."""
    inner = serve(lambda _: serve.Reply(b"secret"))
    for target in (f"{inner.url}/", f"http://localhost:{inner.port}/", "file:///etc/passwd"):
        outer = serve(lambda _, to=target: serve.Reply(status=302, headers=(("location", to),)))
        async with opened(
            "visit", private_hosts=[f"127.0.0.1:{outer.port}"], robots=False
        ) as visit:
            seen = await visit(url=outer.url)
        assert not seen.ok
        assert inner.asked == []
    loop = serve(lambda _: serve.Reply(status=302, headers=(("location", "/"),)))
    async with opened("visit", private_hosts=["127.0.0.1"], robots=False) as visit:
        assert "redirects too often" in (await visit(url=loop.url)).text
    assert len(loop.asked) == 6


@pytest.mark.parametrize("robots", [True, False])
@pytest.mark.parametrize(
    "target",
    ["http://[domain]/", "http://xn--a.-/", "http://[", "http://127.0.0.1:99999/", "http://a:b/"],
)
async def test_a_redirect_to_nowhere_is_told(serve: Any, target: str, robots: bool) -> None:
    """Whichever page redirects there."""
    site = serve(lambda _: serve.Reply(status=302, headers=(("location", target),)))
    async with opened("visit", private_hosts=["127.0.0.1"], robots=robots) as visit:
        seen = await visit(url=site.url)
    assert not seen.ok
    assert len(site.asked) == 1


@pytest.mark.parametrize("host", ["www.bücher.example", "www.xn--bcher-kva.example"])
async def test_an_international_name_is_asked_for_as_the_wire_writes_it(
    serve: Any, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """However the URL writes it; what may be visited is compared in the same form, and must be named in it."""
    known = "www.xn--bcher-kva.example"
    find = socket.getaddrinfo

    def found(name: str, *rest: Any, **more: Any) -> Any:
        return find("127.0.0.1" if name == known else name, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    site = serve(lambda _: serve.Reply(b"hello", "text/plain"))
    url = f"http://{host}:{site.port}/"
    async with opened("visit", hosts=["xn--bcher-kva.example"], private_hosts=[known]) as visit:
        assert (await visit(url=url)).text == f"http://{known}:{site.port}/\n\nhello"
    assert [asked.headers["host"] for asked in site.asked] == [f"{known}:{site.port}"] * 2
    async with opened("visit") as visit:
        assert (await visit(url=url)).text == f"{known} is not a public host."
    async with opened("visit", hosts=["example.org"]) as visit:
        assert "may be visited: example.org" in (await visit(url=url)).text
    assert len(site.asked) == 2
    for option in ("hosts", "private_hosts"):
        with pytest.raises(ToolError, match=option):
            load_tools(["visit"], options={"visit": {option: ["bücher.example"]}})


async def test_an_address_in_brackets_keeps_them(serve: Any) -> None:
    """In the `host` header."""
    site = serve(lambda _: serve.Reply(b"hello", "text/plain"))
    async with opened("visit", private_hosts=["::ffff:127.0.0.1"], robots=False) as visit:
        assert (await visit(url=f"http://[::ffff:127.0.0.1]:{site.port}/")).ok
    assert site.asked[0].headers["host"] == f"[::ffff:127.0.0.1]:{site.port}"


async def test_only_named_hosts(serve: Any) -> None:
    """And those below them; the refusal names them."""
    site = serve(lambda _: serve.Reply(b"x"))
    async with opened("visit", hosts=["example.org"], private_hosts=["127.0.0.1"]) as visit:
        seen = await visit(url=site.url)
        assert "may be visited: example.org" in seen.text
        for other in ("http://badexample.org/", "http://example.org.evil.invalid/"):
            assert "may be visited" in (await visit(url=other)).text
    assert site.asked == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("fe80::1%eth0", False),
        ("ff02::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    """As they are wrapped."""
    assert is_public(address) is public


async def test_robots_are_obeyed(serve: Any) -> None:
    """Asked for once a site; what is missing forbids nothing, a server that fails forbids all."""
    rules = b"User-agent: *\nDisallow: /secret\nAllow: /secret/open$\n"

    def answer(asked: Any) -> Any:
        return serve.Reply(rules if asked.path == "/robots.txt" else b"hello", "text/plain")

    site = serve(answer)
    async with opened("visit", private_hosts=["127.0.0.1"]) as visit:
        assert (await visit(url=f"{site.url}/a")).ok
        assert (await visit(url=f"{site.url}/secret/open")).ok
        seen = await visit(url=f"{site.url}/secret/x")
        assert seen.text == f"{site.url}/secret/x may not be read by programs (robots.txt)."
        assert paths(site) == ["/robots.txt", "/a", "/secret/open"]
        broken = serve(lambda _: serve.Reply(status=503))
        assert "status 503" in (await visit(url=f"{broken.url}/a")).text
        assert paths(broken) == ["/robots.txt"]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ({"body": b"x" * 70_000}, "larger than 64 KB"),
        ({"body": b"x" * 10_000, "endless": True}, "larger than 64 KB"),
        ({"body": gzip.compress(b"x" * 50_000_000), "headers": (("content-encoding", "gzip"),)}, "larger than"),
        ({"body": b"junk", "headers": (("content-encoding", "gzip"),)}, "cannot be unpacked"),
        ({"body": b"junk", "headers": (("content-encoding", "br"),)}, "packed as br"),
        ({"body": b"%PDF", "media_type": "application/pdf"}, "is no text but application/pdf"),
        ({"status": 500}, "status 500"),
    ],
)  # fmt: skip
async def test_what_is_no_readable_page_is_told(serve: Any, reply: Any, says: str) -> None:
    """Sizes are counted unpacked, while they come."""
    site = serve(lambda _: serve.Reply(**reply))
    async with opened(
        "visit", private_hosts=["127.0.0.1"], robots=False, max_bytes=64 << 10
    ) as visit:
        seen = await visit(url=site.url)
    assert not seen.ok
    assert says in seen.text


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
async def test_packed_pages_are_unpacked(serve: Any, pack: Callable[[bytes], bytes]) -> None:
    coding = "gzip" if pack is gzip.compress else "deflate"
    headers = (("content-encoding", coding),)
    site = serve(lambda _: serve.Reply(pack(b"hello"), "text/plain", headers=headers))
    async with opened("visit", private_hosts=["127.0.0.1"], robots=False) as visit:
        assert (await visit(url=site.url)).text.endswith("hello")


async def test_a_server_that_never_ends_is_left(serve: Any) -> None:
    """When the call's time is over."""
    site = serve(lambda _: serve.Reply(b"", endless=True))
    async with opened("visit", wall_s=0.5, private_hosts=["127.0.0.1"], robots=False) as visit:
        assert await visit(url=site.url) == Observation(text="Timed out after 0.5 s.", ok=False)


# -- searching ---------------------------------------------------------------------------------------

FOUND = {
    "serper": {"organic": [{"title": "T", "link": "http://x/", "snippet": "S"}] * 9},
    "tavily": {"results": [{"title": "T", "url": "http://x/", "content": "S"}] * 9},
    "brave": {"web": {"results": [{"title": "T", "url": "http://x/", "description": "S"}] * 9}},
}
NOTHING = {"serper": {"organic": []}, "tavily": {"results": []}, "brave": {"type": "search"}}


@pytest.mark.parametrize("provider", FOUND)
async def test_each_provider_is_asked_its_way(
    serve: Any, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    """Query, count and key travel as it wants them; the same question is asked once."""
    monkeypatch.setenv(f"{provider.upper()}_API_KEY", "the key")

    def answer(asked: Any) -> Any:
        found = NOTHING if "nothing" in asked.path + asked.body.decode() else FOUND
        return serve.Reply(json.dumps(found[provider]).encode(), "application/json")

    site = serve(answer)
    async with opened("web_search", provider=provider, url=f"{site.url}/find") as web_search:
        seen = await web_search(query="what  is\n it?", limit=2)
        assert seen.text == "1. T\nhttp://x/\nS\n\n2. T\nhttp://x/\nS"
        assert await web_search(query="what is it?", limit=2) == seen
        assert (await web_search(query="nothing")).text == "Nothing was found."
        assert not (await web_search(query=" ")).ok
        assert not (await web_search(query="x" * 600)).ok
    asked = site.asked[0]
    assert len(site.asked) == 2
    assert "the key" in "".join(asked.headers.values())
    assert "what+is+it%3F" in asked.path or json.loads(asked.body).items() & {
        ("q", "what is it?"),
        ("query", "what is it?"),
    }


async def test_a_busy_provider_is_asked_again(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the call succeeds; one that refuses the key is not asked again, and is nobody's query."""
    monkeypatch.setenv("SERPER_API_KEY", "k")
    statuses = [429, 503, 200]

    def answer(_: Any) -> Any:
        return serve.Reply(json.dumps(FOUND["serper"]).encode(), status=statuses.pop(0))

    site = serve(answer)
    async with opened("web_search", url=site.url) as web_search:
        assert (await web_search(query="q")).ok
        statuses += [403, 200]
        with pytest.raises(ToolError, match="status 403"):
            await web_search(query="r")
    assert len(site.asked) == 4


@pytest.mark.parametrize("body", [b"junk", b"[]", b'{"organic": [{}]}'])
async def test_an_answer_of_no_known_shape_is_nobodys_query(
    serve: Any, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "k")
    site = serve(lambda _: serve.Reply(body))
    async with opened("web_search", url=site.url) as web_search:
        with pytest.raises(ToolError, match="no known shape"):
            await web_search(query="q")


async def test_a_missing_key_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable's name."""
    monkeypatch.delenv("BRAVE_API_KEY", raising=False)
    with pytest.raises(ToolError, match="BRAVE_API_KEY"):
        async with opened("web_search", provider="brave"):
            pass
