"""Logins: who is let in as what, in memory and as files: `FOLDER/<role>.json`, each an Endpoint.

`read_logins` takes what users give as `--nats`: a URL or the file of one login, which serves for everything that they
do, as far as its rights go; or such a folder, from which each role takes its own.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import nkeys
from msgspec.structs import replace

from bus.connection import Endpoint
from bus.errors import BusError
from bus.subjects import ROLES

SYSTEM = "system"
"""Whose login is for the server's own account; no process of ours uses it."""
UNRESTRICTED = "unrestricted"
"""Whose login may do everything; there is none but in tests and benchmarks."""
_OWNERS_ONLY = 0o600


class BadLogin(BusError):
    """A login that is not there, or a file that is none."""


class Logins(msgspec.Struct, frozen=True):
    """How each role is let in at one server."""

    by_role: dict[str, Endpoint]
    otherwise: Endpoint | None = None
    """For the roles without one of their own."""

    @property
    def url(self) -> str:
        """Where the server is."""
        known = self.otherwise or next(iter(self.by_role.values()))
        return known.url

    def of(self, role: str) -> Endpoint:
        """A role's login. Raises BadLogin when there is none."""
        found = self.by_role.get(role, self.otherwise)
        if found is None:
            known = ", ".join(sorted(self.by_role))
            raise BadLogin(
                f"no login of the role {role!r} for {self.url}, only of {known}: --nats FOLDER needs the file "
                f"{role}.json that `actors nats-conf` writes"
            )
        return found

    def write(self, folder: Path) -> None:
        """A file for each role, for its owner's eyes only; what is there already is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        for role, endpoint in self.by_role.items():
            path = folder / f"{role}.json"
            new = path.with_suffix(".new")
            new.touch(mode=_OWNERS_ONLY)
            new.write_bytes(msgspec.json.format(msgspec.json.encode(endpoint)) + b"\n")
            new.rename(path)


def new_logins(
    url: str, ca: str = "", *, kept: Mapping[str, str] | None = None, unrestricted: bool = False
) -> Logins:
    """A login for every role, with the seeds that are kept, by role, and new ones."""
    seeds = {role: _new_seed() for role in (*ROLES, SYSTEM)} | dict(kept or {})
    logins = {role: Endpoint(url=url, role=role, seed=seed, ca=ca) for role, seed in seeds.items()}
    if unrestricted:
        logins[UNRESTRICTED] = Endpoint(url=url, seed=_new_seed(), ca=ca)
    return Logins(logins)


def _new_seed() -> str:
    return str(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())


def public_key(seed: str) -> str:
    """What the server knows of it. Raises BadLogin for what is no seed."""
    try:
        return str(nkeys.from_seed(bytearray(seed.encode())).public_key.decode())
    except (nkeys.NkeysError, ValueError) as error:
        raise BadLogin("a seed that is none") from error


def read_login(path: Path) -> Endpoint:
    """The login in a file; `ca` is relative to it. Raises BadLogin."""
    try:
        endpoint = msgspec.json.decode(path.read_bytes(), type=Endpoint)
        if endpoint.seed:
            public_key(endpoint.seed)
    except OSError as error:
        raise BadLogin(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, BadLogin) as error:
        raise BadLogin(
            f"{path}: not a login ({error}): `actors nats-conf` writes them, as JSON with url, role, seed and ca"
        ) from error
    if not endpoint.ca:
        return endpoint
    ca = path.parent.resolve() / endpoint.ca
    if not ca.is_file():
        raise BadLogin(f"{path}: ca: there is no file {ca}: `make certs` makes it")
    return replace(endpoint, ca=str(ca))


def read_kept(folder: Path) -> dict[str, str]:
    """The seeds of the logins that are in a folder, by role. Raises BadLogin."""
    files = ((role, folder / f"{role}.json") for role in (*ROLES, SYSTEM))
    return {role: read_login(file).seed for role, file in files if file.exists()}


def read_logins(where: str) -> Logins:
    """The logins that `--nats` names: see above. Raises BadLogin."""
    if "://" in where:
        return Logins({}, Endpoint(url=where))
    path = Path(where)
    if path.is_file():
        return Logins({}, read_login(path))
    found = [read_login(each) for each in sorted(path.glob("*.json"))]
    if not found:
        raise BadLogin(
            f"--nats {where}: neither a URL (nats://host:port) nor the file of a login nor a folder of them: "
            "`actors nats-conf FOLDER` writes one"
        )
    return Logins({each.role: each for each in found})
