"""What can go wrong on the bus.

BusError
├── Unreachable   no server answers there
├── Unavailable   the server did not confirm in time; it may or may not have stored the message
├── Conflict      the log has moved: somebody else's event came first
├── Full          a stream is at its limit
├── Missing       a key or an object is not there
├── Corrupt       an object's bytes are not what its name says
└── BadMessage    bytes that are no message of ours
"""


class BusError(Exception):
    """The base of all."""


class Unreachable(BusError):
    """No server answers at the address, or it refuses the credentials."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"no NATS server at {url}: {why}")
        self.url = url


class Unavailable(BusError):
    """The server did not confirm in time."""

    def __init__(self, subject: str, why: str) -> None:
        super().__init__(f"{subject}: not confirmed: {why}")
        self.subject = subject


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
