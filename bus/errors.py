"""What can go wrong on the bus.

BusError
├── Unreachable   no server answers there
├── Denied        the server does not let this role do it
├── Unavailable   the server did not confirm in time; it may or may not have stored the message
├── InUse         another process has a server on that store
├── TooLarge      more than a message may hold
├── Conflict      the log has moved: somebody else's event came first
├── Full          a stream is at its limit
├── Missing       a key or an object is not there
├── Corrupt       an object's bytes are not what its name says
└── BadMessage    bytes that are no message of ours
"""

from pathlib import Path


class BusError(Exception):
    """The base of all."""


class Unreachable(BusError):
    """No server answers at the address, or it refuses the credentials."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"no NATS server at {url}: {why}")
        self.url = url


class Denied(BusError):
    """The server does not let this role do it; trying again does not help."""

    def __init__(self, role: str, what: str, subject: str) -> None:
        verb = "publish to" if what == "publish" else "subscribe to"
        super().__init__(
            f"{role or 'this login'} may not {verb} {subject} (as the server writes it): use the login of the "
            "role that may (bus/subjects.py), or renew the server's configuration with `actors nats-conf`"
        )
        self.role = role
        self.subject = subject
        """In lower case."""


class Unavailable(BusError):
    """The server did not confirm in time."""

    def __init__(self, subject: str, why: str, *, refused: bool = False) -> None:
        super().__init__(f"{subject}: not confirmed: {why}")
        self.subject = subject
        self.refused = refused
        """A server has answered, and waiting for one does not help."""


class InUse(BusError):
    """Another process has a server on that store: two would lose what they confirm."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder}: another command has a server on this store: wait until it ends, or end it"
        )
        self.folder = folder


class TooLarge(BusError):
    """More than a message may hold; trying again does not help."""

    def __init__(self, subject: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"{subject}: {size_bytes} bytes; a message of the bus holds {limit_bytes}")
        self.subject = subject
        self.limit_bytes = limit_bytes


class Conflict(BusError):
    """The log has moved past the sequence that this append expected."""

    def __init__(self, subject: str, expected: int) -> None:
        super().__init__(f"{subject}: sequence {expected} is no longer the last")
        self.subject = subject
        self.expected = expected


class Full(BusError):
    """A stream is at its limit and refuses new messages."""

    def __init__(self, subject: str, why: str) -> None:
        super().__init__(f"{subject}: its stream is full: {why}")
        self.subject = subject


class Missing(BusError):
    """A key or an object is not there."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not there")
        self.what = what


class Corrupt(BusError):
    """An object's bytes do not have the hash that is its name."""

    def __init__(self, bucket: str, sha256: str) -> None:
        super().__init__(f"object {sha256} in {bucket} has other bytes than its name says")
        self.sha256 = sha256


class BadMessage(BusError):
    """Bytes that are no message of ours."""

    def __init__(self, subject: str, why: str, payload: bytes) -> None:
        super().__init__(f"{subject}: {why}")
        self.subject = subject
        self.why = why
        self.payload = payload
