"""A container's health check: does its replica answer, and does its event loop run? One that hangs is killed.

Docker starts again what ends and leaves alone what is unhealthy, so this check ends what has stood still for long; what
has never been healthy may still be loading. Standard library only, and quick: it runs every few seconds.
"""

import os
import re
import signal
import socket
import sys
import time

PORT = 9100
LAG_S = 30.0
"""An event loop that has not run for so long stands still."""
HANG_S = 90.0
"""It is killed so long after it was last found well."""
LAST_WELL = "/tmp/last-well"
_LAG = re.compile(rb"^actors_event_loop_lag_seconds(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def is_well() -> bool:
    """Whether the replica answers and its event loop has run of late."""
    try:
        with socket.create_connection(("127.0.0.1", PORT), timeout=12.0) as link:
            link.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: link.recv(1 << 16), b""))
    except OSError:
        return False
    found = _LAG.search(answer)
    return found is not None and float(found[1]) < LAG_S


def main() -> int:
    """The exit status of the check."""
    if is_well():
        with open(LAST_WELL, "w"):
            os.utime(LAST_WELL)
        return 0
    if os.path.exists(LAST_WELL) and time.time() - os.path.getmtime(LAST_WELL) > HANG_S:
        os.kill(-1, signal.SIGKILL)  # all but process 1, which ends with its child, and us
    return 1


if __name__ == "__main__":
    sys.exit(main())
