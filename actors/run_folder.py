"""A run's folder: what it leaves behind, and how to reach it while it lives."""

import os
from pathlib import Path

import msgspec
import psutil

from actors.errors import UserError
from bus.logins import Logins

_CLOCK_S = 1.0
"""By how much a process seems to begin at another time when the clock is set right."""

RUNS = Path(os.environ.get("ACTORS_RUNS", "runs"))


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """What `endpoint.json` says: how each role is let in at a live run's server, and who keeps the run alive."""

    logins: Logins
    supervisor_pid: int
    supervisor_began_s: float = 0.0
    """When that process began, as the machine says: after its end another may have its number."""


class RunFolder:
    """`runs/<name>/`, or that of one of the run's shadows in it."""

    def __init__(self, run: str, shadow: str = "") -> None:
        self.run = run
        self.path = RUNS / run / "shadow" / shadow if shadow else RUNS / run
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.nats = self.path / "nats"
        self._endpoint = self.path / "endpoint.json"

    def write_endpoint(self, logins: Logins) -> None:
        """Let others on this machine, of this user, join."""
        began_s = psutil.Process().create_time()
        live = Live(logins=logins, supervisor_pid=os.getpid(), supervisor_began_s=began_s)
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
            began_s = psutil.Process(live.supervisor_pid).create_time()
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None
        same = not live.supervisor_began_s or abs(began_s - live.supervisor_began_s) < _CLOCK_S
        return live if same else None


def find_live(run: str | None) -> tuple[str, Logins]:
    """The run of that name, or the one that is alive. Raises UserError when it is none or not one."""
    folders = [RunFolder(run)] if run else [RunFolder(path.name) for path in _run_paths()]
    alive = [(folder.run, live.logins) for folder in folders if (live := folder.live())]
    if len(alive) == 1:
        return alive[0]
    if not alive and run:
        known = ", ".join(path.name for path in _run_paths()) or "none"
        where = f"run {run!r} is not alive (looked in {RUNS}/, which has: {known})"
        raise UserError(f"{where}: `actors train RECIPE --run {run}` begins it, or goes on")
    if not alive:
        how = "start one with `actors train RECIPE`, or name one at rest with --run NAME"
        raise UserError(f"no run is alive (looked in {RUNS}/): {how}")
    names = ", ".join(sorted(name for name, _ in alive))
    raise UserError(f"more than one run is alive ({names}): say which with --run NAME")


def _run_paths() -> list[Path]:
    return sorted(path for path in RUNS.glob("*") if path.is_dir()) if RUNS.is_dir() else []
