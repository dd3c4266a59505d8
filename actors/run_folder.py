"""A run's folder: what it leaves behind, and how to reach it while it lives."""

import os
from pathlib import Path

import msgspec

from actors.errors import UserError
from bus.connection import Endpoint

RUNS = Path(os.environ.get("ACTORS_RUNS", "runs"))


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """What `endpoint.json` says: the address of a live run, and who keeps it alive."""

    endpoint: Endpoint
    supervisor_pid: int


class RunFolder:
    """`runs/<name>/`."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.path = RUNS / run
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.nats = self.path / "nats"
        self._endpoint = self.path / "endpoint.json"

    def write_endpoint(self, endpoint: Endpoint) -> None:
        """Let others on this machine, of this user, join."""
        live = Live(endpoint=endpoint, supervisor_pid=os.getpid())
        new = self._endpoint.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(msgspec.json.encode(live))
        new.rename(self._endpoint)

    def remove_endpoint(self) -> None:
        """The run is over, or at rest."""
        self._endpoint.unlink(missing_ok=True)

    def live(self) -> Live | None:
        """How to reach the run, if its supervisor is alive."""
        try:
            live = msgspec.json.decode(self._endpoint.read_bytes(), type=Live)
            os.kill(live.supervisor_pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return None
        except PermissionError:
            return live
        return live


def find_live(run: str | None) -> tuple[str, Endpoint]:
    """The run of that name, or the one that is alive. Raises UserError when it is none or not one."""
    folders = [RunFolder(run)] if run else [RunFolder(path.name) for path in _run_paths()]
    alive = [(folder.run, live.endpoint) for folder in folders if (live := folder.live())]
    if len(alive) == 1:
        return alive[0]
    if not alive:
        what = f"run {run!r} is not alive" if run else "no run is alive"
        raise UserError(f"{what} (looked in {RUNS}/): start one with `actors train RECIPE`")
    names = ", ".join(sorted(name for name, _ in alive))
    raise UserError(f"more than one run is alive ({names}): say which with --run NAME")


def _run_paths() -> list[Path]:
    return sorted(path for path in RUNS.glob("*") if path.is_dir()) if RUNS.is_dir() else []
