"""Forks the worlds: a process that does nothing else. Standard library only.

    server ──order: disk_bytes; stage, network──► template ──spawn──► init       of a process namespace of its own
       ▲                                             │  └────fork───► payload    the server's child, not the template's
       └──────answer: init, payload, namespace───────┘

What a process touches between two forks is copied each time, so this one holds the imported modules and touches next
to nothing. The forks are its siblings: the server waits for them.
"""

import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from tools.sandbox import linux, root
from tools.sandbox.batch import Batch
from tools.sandbox.payload import stand_by
from tools.sandbox.world import World

_OWN_PID = 2
"""In the server's namespace; so is the payload's in its own, after init: see linux.fork_sibling."""
_MESSAGE_BYTES = 1 << 12
_REFUSED = b"!"


class Made(NamedTuple):
    """What a world consists of."""

    init: int
    payload: int
    namespace: int
    """Inode of the process namespace that all its processes are in."""

    def end(self) -> None:
        """Kill them; the caller is the payload's parent."""
        os.kill(self.init, signal.SIGKILL)
        os.waitpid(self.payload, 0)


class Template:
    """The server's end."""

    def __init__(self, imports: Sequence[str], usual_disk_bytes: int) -> None:
        """Start it, and wait until it has imported. Raises OSError, also for what cannot be imported."""
        self.channel, far_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far_channel:
            pid = os.fork()
            if pid == 0:
                self.channel.close()
                _become_template(far_channel, imports, usual_disk_bytes)
        if pid != _OWN_PID:
            raise OSError(f"the template is process {pid}, not {_OWN_PID}")
        self._hear()

    def make(self, disk_bytes: int, stage: socket.socket, network_fd: int) -> Made:
        """A world whose payload stands by at the stage's other end. Raises OSError."""
        order = [str(disk_bytes).encode()]
        socket.send_fds(self.channel, order, [stage.fileno(), network_fd])
        init, payload, namespace = self._hear().split()
        return Made(int(init), int(payload), int(namespace.strip(b"pid:[]")))

    def _hear(self) -> bytes:
        answer = self.channel.recv(_MESSAGE_BYTES)
        if not answer:
            os._exit(1)  # nothing can be made any more; the client starts another server
        if answer.startswith(_REFUSED):
            raise OSError(answer[1:].decode())
        return answer


def _become_template(channel: socket.socket, imports: Sequence[str], disk: int) -> NoReturn:
    try:
        try:
            world = _prepare(imports, disk)
        except (OSError, ImportError) as error:
            channel.send(_REFUSED + f"{type(error).__name__}: {error}".encode())
        else:
            channel.send(b"ready")
            _serve(channel, world)
    finally:
        os._exit(1)


def _prepare(imports: Sequence[str], disk_bytes: int) -> World:
    world = World()
    world.mount_scratch(disk_bytes)  # a module may want to write when it is imported
    for name in imports:
        importlib.import_module(name)
    world.unmount_scratch()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise ImportError(f"importing {', '.join(imports)} started threads; forks of it would hang")
    world.measure()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
        del sys.modules[name]  # not the code's business
    quiet = Batch()
    quiet.on_signal(signal.SIGCHLD, 1)  # nobody waits for inits
    quiet.prepare()
    quiet.run()
    gc.collect()
    gc.freeze()  # no collection touches, and so copies, what the forks share
    linux.use_huge_pages()
    return world


def _serve(channel: socket.socket, world: World) -> None:
    own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
    while True:
        order, fds = linux.receive_fds(channel, _MESSAGE_BYTES, 2)
        if not order:
            return
        linux.unshare(linux.CLONE_NEWPID)
        try:
            answer = _make(world, int(order), *fds)
        except OSError as error:
            answer = _REFUSED + str(error).encode()
        finally:
            linux.setns(own_namespace, linux.CLONE_NEWPID)
        for fd in fds:
            os.close(fd)
        channel.send(answer)


def _make(world: World, disk_bytes: int, stage_fd: int, network_fd: int) -> bytes:
    init = os.posix_spawn(root.INIT, [root.INIT], {})
    try:
        payload = linux.fork_sibling()
        if payload == 0:
            stand_by(stage_fd, network_fd, world, disk_bytes)
        namespace = os.readlink(b"/proc/self/ns/pid_for_children")
    except OSError:
        os.kill(init, signal.SIGKILL)
        raise
    return b"%d %d %s" % (init, payload, namespace)
