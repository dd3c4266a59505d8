"""Fetches pages for `visit`: from public addresses or named hosts only, within limits, where robots.txt allows it.

A host's name is resolved here, every address it has is checked, and the request goes to the address that was checked:
a name that resolves differently a moment later gains nothing. Each redirect is checked anew.
"""

import asyncio
import ipaddress
import socket
import zlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Annotated, Generic, NamedTuple, TypeVar

import httpx2
from msgspec import Meta
from protego import Protego

from tools.tool import Options

_ROBOTS_BYTES = 500 << 10
_TEXTS = ("text/", "application/json", "application/xml", "application/xhtml+xml")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Host = Annotated[str, Meta(pattern=r"^[\x00-\x7f]*$")]
"""As requests carry it: `xn--bcher-kva.example`."""

V = TypeVar("V")


class WebOptions(Options, frozen=True):
    """What may be fetched."""

    hosts: list[Host] = []
    """Only these hosts and those below them; empty: any."""
    private_hosts: list[Host] = []
    """`host` or `host:port` that may have private addresses (this machine, the local network); by default none may."""
    robots: bool = True
    """Obey robots.txt."""
    user_agent: str = "agentic-actors"
    max_bytes: Annotated[int, Meta(ge=1)] = 4 << 20
    max_redirects: Annotated[int, Meta(ge=0)] = 5
    cached: Annotated[int, Meta(ge=0)] = 256
    """Pages (or searches) that one toolbox remembers, the least used being forgotten first."""


class Refused(Exception):
    """A page that cannot be had; the message is for the policy."""


class Fetched(NamedTuple):
    """What a server sent."""

    url: str
    """After redirects."""
    media_type: str
    charset: str
    data: bytes


class Remembered(Generic[V]):
    """The newest values by key."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        """The value, which is used now."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def keep(self, key: Hashable, value: V) -> None:
        """Remember it; forget the least used."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._count:
            self._values.popitem(last=False)


class Fetcher:
    """Fetches pages, many at once."""

    def __init__(self, client: httpx2.AsyncClient, options: WebOptions) -> None:
        """`client`: without proxies and redirects of its own."""
        self._client = client
        self._options = options
        self._robots: Remembered[Protego | None] = Remembered(1024)

    async def fetch(self, address: str, wall_s: float) -> Fetched:
        """The page at an http or https address. Raises Refused, and TimeoutError."""
        async with asyncio.timeout(wall_s):
            url = _parse(address)
            for _ in range(self._options.max_redirects + 1):
                await self._ask_robots(url)
                response, data = await self._get(url, self._options.max_bytes)
                if not response.has_redirect_location:
                    return _fetched(url, response, data)
                url = _parse(response.headers["location"], url)
        raise Refused(f"{address} redirects too often.")

    async def _ask_robots(self, url: httpx2.URL) -> None:
        if not self._options.robots:
            return
        place = url.copy_with(raw_path=b"/robots.txt", fragment=None)
        rules = self._robots.get(str(place))
        if rules is None:
            rules = await self._read_robots(place)
            self._robots.keep(str(place), rules)
        if not rules.can_fetch(str(url), self._options.user_agent):
            raise Refused(f"{url} may not be read by programs (robots.txt).")

    async def _read_robots(self, place: httpx2.URL) -> Protego:
        """RFC 9309, section 2.3.1: what is not there forbids nothing, a server that fails forbids all."""
        for _ in range(self._options.max_redirects + 1):
            response, data = await self._get(place, _ROBOTS_BYTES)
            if not response.has_redirect_location:
                break
            place = _parse(response.headers["location"], place)
        if response.status_code >= 500:
            raise Refused(f"{place} answers with status {response.status_code}.")
        found = response.is_success
        return Protego.parse(data.decode(errors="replace") if found else "")

    async def _get(self, url: httpx2.URL, max_bytes: int) -> tuple[httpx2.Response, bytes]:
        """One request, to an address that was checked."""
        ip = await self._resolve(url)
        host = url.raw_host.decode()
        request = self._client.build_request(
            "GET",
            url.copy_with(host=ip),
            headers={
                "host": url.netloc.decode(),
                "user-agent": self._options.user_agent,
                "accept": "text/html, text/*;q=0.9, application/json;q=0.9",
                "accept-encoding": "gzip, deflate",
            },
            extensions={"sni_hostname": host},
        )
        try:
            response = await self._client.send(request, stream=True)
            try:
                return response, await _read(response, max_bytes)
            finally:
                await response.aclose()
        except (httpx2.HTTPError, UnicodeError) as error:  # it reads redirects before we do
            reason = str(error) or type(error).__name__
            raise Refused(f"{host} does not answer: {reason}") from error

    async def _resolve(self, url: httpx2.URL) -> str:
        """An address of the host. Raises Refused unless it may be asked and all its addresses are public."""
        host, port = url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80)
        hosts = self._options.hosts
        if hosts and not any(host == one or host.endswith(f".{one}") for one in hosts):
            raise Refused(f"{host} is not among the sites that may be visited: {', '.join(hosts)}.")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
        except (OSError, UnicodeError) as error:
            raise Refused(f"There is no host {host}.") from error
        addresses = [str(info[4][0]) for info in found]
        named = {host, f"{host}:{port}"} & set(self._options.private_hosts)
        if not named and not all(is_public(address) for address in addresses):
            raise Refused(f"{host} is not a public host.")
        return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, whatever it is wrapped in."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _parse(address: str, base: httpx2.URL | None = None) -> httpx2.URL:
    """The URL, which may be relative to `base`. Raises Refused unless it can be asked for.

    Of its host we use `raw_host` alone: `host`, in which international names are decoded, may raise, and need not be
    the name that is resolved.
    """
    try:
        url = base.join(address) if base else httpx2.URL(address.strip())
    except (httpx2.InvalidURL, ValueError) as error:
        raise Refused(f"{address[:200]!r} is not a URL: {error}") from error
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise Refused(f"{address[:200]!r} has no port that there is.")
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise Refused(f"{address[:200]!r} is not an http or https URL.")
    if url.userinfo:
        raise Refused("A URL with a password is not visited.")
    return url.copy_with(fragment=None)


async def _read(response: httpx2.Response, max_bytes: int) -> bytes:
    """The body, unpacked here: a little that unpacks to a lot is not read."""
    coding = response.headers.get("content-encoding", "identity").lower()
    if coding not in ("identity", "gzip", "deflate", ""):
        raise Refused(f"The page is packed as {coding}, which was not asked for.")
    unpacker = zlib.decompressobj(47) if coding in ("gzip", "deflate") else None
    data = bytearray()
    async for chunk in response.aiter_raw():
        try:
            data += unpacker.decompress(chunk, max_bytes + 1) if unpacker else chunk
        except zlib.error as error:
            raise Refused("The page cannot be unpacked.") from error
        if len(data) > max_bytes:
            raise Refused(f"The page is larger than {max_bytes >> 10} KB.")
    return bytes(data)


def _fetched(url: httpx2.URL, response: httpx2.Response, data: bytes) -> Fetched:
    if not response.is_success:
        raise Refused(f"{url} answers with status {response.status_code}.")
    content_type = response.headers.get("content-type", "text/html")
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type.startswith(_TEXTS):
        raise Refused(f"{url} is no text but {media_type}.")
    return Fetched(str(url), media_type, response.charset_encoding or "", data)
