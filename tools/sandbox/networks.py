"""Empty network namespaces, used again and again: making one costs more than the rest of a world.

Standard library only. Nobody inside can configure one, so all that could be left of an earlier call is a unix socket
with an abstract name. Such a socket dies with the processes that hold it, but one that is on its way to itself in a
message is collected a little later; so a namespace is looked at before it is used again, and thrown away if there is
anything in it.
"""

import os

from tools.sandbox import linux

_SPARE = 64


class Networks:
    """Gives out descriptors of empty network namespaces; of one thread only."""

    def __init__(self) -> None:
        self._own = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._spare: list[int] = []

    def take(self) -> int:
        """One that nothing is in. Raises OSError."""
        if self._spare:
            return self._spare.pop()
        linux.unshare(linux.CLONE_NEWNET)
        try:
            return os.open("/proc/self/ns/net", os.O_RDONLY)
        finally:
            linux.setns(self._own, linux.CLONE_NEWNET)

    def give_back(self, network: int) -> None:
        """After the last process in it is gone."""
        if len(self._spare) < _SPARE and self._is_empty(network):
            self._spare.append(network)
        else:
            os.close(network)

    def _is_empty(self, network: int) -> bool:
        linux.setns(network, linux.CLONE_NEWNET)
        try:
            fd = os.open("/proc/self/net/unix", os.O_RDONLY)
            try:
                return os.read(fd, 4096).count(b"\n") == 1  # the heading
            finally:
                os.close(fd)
        finally:
            linux.setns(self._own, linux.CLONE_NEWNET)
