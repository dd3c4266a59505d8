"""A learner of several processes: a leader, DeepSpeed's launcher, and the ranks it starts, here or on several hosts.

    supervisor → nursery → leader → deepspeed --module actors.ranks → rank 0, rank 1, …

The leader is the replica that the supervisor knows. Rank 0 is on the bus, under the leader's name; the others hear only
rank 0 (learner/ranks.py). A link between the leader and rank 0 carries the order one way and the wish to stop; where it
breaks, both end. However one of them dies, all end within seconds, and the supervisor begins again.
"""

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import msgspec
from setproctitle import setproctitle

from actors.process import Process
from actors.replica import Rank, serve
from bus.connection import Endpoint
from bus.embedded import die_with_parent, free_port
from schemas.recipe import Learner

if TYPE_CHECKING:  # torch and DeepSpeed, which the leader does not need
    from learner.ranks import Ranks

_STOP = b"stop\n"
_END_S = 10.0
"""How long the launcher may take to end once rank 0 has."""


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """How many processes a learner has, and where."""

    ranks: int
    hostfile: str = ""
    """Empty: all on this machine."""


def group_of(learner: Learner) -> Group | None:
    """None for a learner that is one process without DeepSpeed."""
    return Group(ranks=learner.ranks, hostfile=learner.hostfile) if learner.deepspeed else None


class _Task(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader tells rank 0."""

    run: str
    endpoint: Endpoint
    leader: int
    """Its process id."""


# -- the leader ------------------------------------------------------------------------------------


class _Leader:
    """Starts the launcher, and holds the link to rank 0."""

    def __init__(self, run: str, endpoint: Endpoint, group: Group, folder: Path) -> None:
        self._task = _Task(run=run, endpoint=endpoint, leader=os.getpid())
        self._link: socket.socket | None = None
        self._server = socket.socket(socket.AF_UNIX)
        address = folder / "link"
        self._server.bind(str(address))
        self._server.listen(1)
        self._launcher = subprocess.Popen(
            [
                *(sys.executable, "-m", *_launcher(group), "--no_local_rank"),
                *("--master_port", str(free_port())),
                *("--module", "actors.ranks", str(address), run, str(group.ranks)),
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def stop(self, *_: object) -> None:
        """Let rank 0 finish; before there is one, end."""
        if self._link is None:
            self._kill()
        else:
            with suppress(OSError):
                self._link.sendall(_STOP)

    def lead(self) -> int:
        """Until the group has ended: its exit status, negative for the signal that killed a rank."""
        threading.Thread(target=self._talk, name="link to rank 0", daemon=True).start()
        status = self._launcher.wait()
        self._kill()
        # the launcher says of a rank that was killed `sys.exit(-number)`
        return status - 256 if status > 256 - signal.NSIG else status

    def _talk(self) -> None:
        """Give rank 0 its task; when it has ended the launcher should, soon."""
        link, _ = self._server.accept()
        link.sendall(msgspec.json.encode(self._task) + b"\n")
        self._link = link
        with suppress(OSError):
            link.recv(1)
        try:
            self._launcher.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        """End what is left on this machine."""
        with suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, signal.SIGKILL)


def _launcher(group: Group) -> list[str]:
    """DeepSpeed's module that starts ranks: on hosts, by ssh; here, what it starts on each host, seconds sooner."""
    if group.hostfile:
        return ["deepspeed.launcher.runner", "--hostfile", group.hostfile]
    here = msgspec.json.encode({"localhost": list(range(group.ranks))})
    world = base64.urlsafe_b64encode(here).decode()
    return ["deepspeed.launcher.launch", f"--world_info={world}"]


def lead(run: str, endpoint: Endpoint, group: Group) -> NoReturn:
    """Be the leader: end as the group ends."""
    with tempfile.TemporaryDirectory(prefix="actors-ranks-") as name:
        leader = _Leader(run, endpoint, group, Path(name))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, leader.stop)
        status = leader.lead()
    if status < 0:  # so that the supervisor sees a kill for what it is
        with suppress(OSError):  # nobody catches SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# -- a rank ----------------------------------------------------------------------------------------


def main() -> None:
    """The entry point of a rank: `actors.ranks LINK RUN RANKS`, in the launcher's environment."""
    address, run, wanted = sys.argv[1:]
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    die_with_parent()
    setproctitle(f"actors learner {run} rank {rank}")
    if count != int(wanted):
        if rank == 0:
            sys.stderr.write(f"learner.hostfile has {count} slots, and learner.ranks is {wanted}\n")
        sys.exit(2)
    # what DeepSpeed calls of torch, again and again
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if rank == 0:
        _serve(address)
    _follow()


def _serve(address: str) -> NoReturn:
    """Be rank 0: the learner on the bus."""
    link = socket.socket(socket.AF_UNIX)
    link.connect(address)
    lines = link.makefile("rb")
    task = msgspec.json.decode(lines.readline(), type=_Task)
    threading.Thread(target=_obey, args=(lines,), name="link to the leader", daemon=True).start()
    first = _First()
    serve("learner", task.run, task.endpoint, Rank(task.leader, first.serve, first.leave))


def _obey(lines: socket.SocketIO) -> None:
    """Stop when told to, and end with the leader."""
    for _ in lines:
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGKILL)


class _First:
    """Rank 0, which gives signs of life while it meets the others."""

    def __init__(self) -> None:
        self._ranks: Ranks | None = None

    async def serve(self, process: Process) -> None:
        """Train, and lead the others."""
        ranks = self._ranks = await asyncio.to_thread(_join)
        from actors.training import Training
        from learner.deepspeed_policy import DeepSpeedPolicy

        await Training(process, partial(DeepSpeedPolicy.lead, ranks)).serve()

    def leave(self) -> None:
        """Let the others end."""
        if self._ranks is not None:
            self._ranks.leave()


def _join() -> "Ranks":
    import learner.deepspeed_policy  # noqa: F401 (takes seconds, and the loop has no time)
    from learner.ranks import Ranks

    return Ranks()


def _follow() -> None:
    """Be another rank: do as rank 0 says, until it leaves."""
    from learner.deepspeed_policy import follow

    ranks = _join()
    # rank 0 decides what is finished first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = partial(_crash, ranks)
    follow(ranks)


def _crash(
    ranks: "Ranks", kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.__excepthook__(kind, error, trace)
    ranks.crash(f"{kind.__name__}: {error}")


if __name__ == "__main__":
    main()
