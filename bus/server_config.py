"""What a nats-server is told: where it listens and stores, and who may do what. Never written by hand.

Roles have nkeys: the configuration holds the public ones, which are no secret.

Permissions alone are not enough: the server checks the subject of a message, and not the one that its answer goes to.
Who may ask for a message of the log could have any payload stored on any subject: a reward, a pointer to weights. So
the streams are in an account of their own, from which that of the roles imports what the roles may ask and publish. An
answer ends in the account of who has asked, where no stream listens, whatever its subject is.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bus.logins import SYSTEM, Logins, public_key
from bus.permissions import (
    API,
    ASK,
    MANAGER,
    Rights,
    all_rights,
    many_answers,
    stays_within,
    widest,
)

ACCOUNT = "ACTORS"
"""Has the streams."""
GUESTS = "ROLES"
"""Has the roles."""
SYSTEM_ACCOUNT = "SYS"
MAX_PAYLOAD = "8MB"

_MANY_ANSWERS = ', response_type: stream, response_threshold: "20s"'
"""Of an export. The time is from answer to answer; a pull lasts for 5 s."""


class Certificates(NamedTuple):
    """Files (PEM) as the server finds them."""

    certificate: str
    key: str
    ca: str


class Cluster(NamedTuple):
    """Servers that hold the streams together. Its configuration holds a secret, the password of its members."""

    listen: str
    """`host:port`, for the others alone."""
    routes: list[str]
    """`host:port` of each; its own may be among them."""


class Server(NamedTuple):
    """The parts of a configuration."""

    name: str
    listen: str
    """`host:port`."""
    store: str
    logins: Logins
    limit_bytes: int = 0
    """What its streams may take. 0: as much as the server decides, which it tells nobody."""
    analytics_sees_answers: bool = False
    certificates: Certificates | None = None
    monitor: str = ""
    """`host:port` of what says over HTTP how it stands. Empty: none."""
    cluster: Cluster | None = None
    """None: it is alone."""
    more: str = ""
    """Blocks to be added as they are."""


def config_text(server: Server) -> str:
    """The file."""
    return "\n".join(
        [
            "# Made by the project from bus/subjects.py. Do not edit: make it anew.",
            f"listen: {_quoted(server.listen)}",
            f"server_name: {_quoted(server.name)}",
            f"max_payload: {MAX_PAYLOAD}",
            *_jetstream(server),
            *([f"http: {_quoted(server.monitor)}"] if server.monitor else []),
            *_tls(server.certificates),
            *_cluster(server),
            *_accounts(server),
            *([server.more] if server.more else []),
            "",
        ]
    )


def _quoted(text: str | Path) -> str:
    return json.dumps(str(text))


def _jetstream(server: Server) -> Iterator[str]:
    yield "jetstream {"
    yield f"  store_dir: {_quoted(server.store)}"
    yield '  sync_interval: "5s"'
    if server.limit_bytes:
        yield f"  max_file_store: {server.limit_bytes}"
    yield "}"


def _tls(files: Certificates | None) -> Iterator[str]:
    if files is not None:
        yield "tls {"
        yield f"  cert_file: {_quoted(files.certificate)}"
        yield f"  key_file: {_quoted(files.key)}"
        yield f"  ca_file: {_quoted(files.ca)}"
        yield "}"


def _cluster(server: Server) -> Iterator[str]:
    if server.cluster is not None:
        # who gets in as a server may do everything; of a seed that no process of ours uses
        seed = server.logins.by_role[SYSTEM].seed
        password = hashlib.sha256(f"route {seed}".encode()).hexdigest()
        yield "cluster {"
        yield "  name: actors"
        yield f"  listen: {_quoted(server.cluster.listen)}"
        yield f'  authorization {{ user: route, password: "{password}" }}'
        yield from _tls(server.certificates)  # among servers it asks for the other's, too
        yield "  routes: ["
        yield from (f'    "nats://route:{password}@{each}"' for each in server.cluster.routes)
        yield "  ]"
        yield "}"


def _accounts(server: Server) -> Iterator[str]:
    keys = {role: public_key(each.seed) for role, each in server.logins.by_role.items()}
    rights = all_rights(analytics_sees_answers=server.analytics_sees_answers)
    guests = [role for role in rights if role != MANAGER]
    # the widest: what two imports match would be stored twice
    services = sorted(widest(each for role in guests for each in _leaving(rights[role].publish)))
    heard = sorted(widest(each for role in guests for each in _leaving(rights[role].subscribe)))
    yield f"system_account: {SYSTEM_ACCOUNT}"
    yield "accounts {"
    yield f"  {SYSTEM_ACCOUNT} {{ users: [ {{ nkey: {keys.pop(SYSTEM)} }} ] }}"
    yield f"  {ACCOUNT} {{"
    yield f"    jetstream {{ {_limit(server)} }}"
    yield "    users: ["
    for role in keys.keys() - rights.keys():
        yield f"      {{ nkey: {keys[role]} }} # {role}"
    yield from _user(keys[MANAGER], rights[MANAGER])
    yield "    ]"
    yield "    exports: ["
    for pattern in heard:
        yield f"      {{ stream: {_quoted(pattern)} }}"
    for pattern in services:
        many = _MANY_ANSWERS if many_answers(pattern) else ""
        yield f"      {{ service: {_quoted(_asked(pattern))}{many} }}"
    yield "    ]"
    yield "  }"
    yield f"  {GUESTS} {{"
    yield "    users: ["
    for role in guests:
        yield from _user(keys[role], rights[role])
    yield "    ]"
    yield "    imports: ["
    for pattern in heard:
        yield f"      {{ stream: {{ account: {ACCOUNT}, subject: {_quoted(pattern)} }} }}"
    for pattern in services:
        source = f"{{ account: {ACCOUNT}, subject: {_quoted(_asked(pattern))} }}"
        here = "" if pattern == _asked(pattern) else f", to: {_quoted(pattern)}"
        yield f"      {{ service: {source}{here} }}"
    yield "    ]"
    yield "  }"
    yield "}"


def _limit(server: Server) -> str:
    """The server's own limit again, since it tells its clients only that of their account; all servers count."""
    servers = len(server.cluster.routes) if server.cluster else 1
    return f"max_file: {server.limit_bytes * servers}" if server.limit_bytes else ""


def _asked(pattern: str) -> str:
    """What a guest's subject is called where the streams are."""
    return API + pattern.removeprefix(ASK) if pattern.startswith(f"{ASK}.") else pattern


def _leaving(patterns: Iterable[str]) -> Iterator[str]:
    return (each for each in patterns if not stays_within(each))


def _user(key: str, rights: Rights) -> Iterator[str]:
    yield f"      {{ nkey: {key}"
    yield "        permissions {"
    for verb, allowed, denied in (
        ("publish", rights.publish, rights.never_publish),
        ("subscribe", rights.subscribe, frozenset[str]()),
    ):
        yield f"          {verb} {{"
        for name, patterns in (("allow", allowed), ("deny", denied)):
            if patterns:
                yield f"            {name}: ["
                yield from (f"              {_quoted(pattern)}" for pattern in sorted(patterns))
                yield "            ]"
        yield "          }"
    yield "        }"
    yield "      }"
