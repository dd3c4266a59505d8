"""What the processes of a namespace take, from /proc. Standard library only."""

import contextlib
import os
import resource
from collections.abc import Iterable

_PAGE_BYTES = resource.getpagesize()


def pids() -> list[int]:
    """Of all processes that are to be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def descendants(pid: int) -> list[int]:
    """Pids of all that come from a process."""
    children: dict[int, list[int]] = {}
    for one in pids():
        try:
            with open(f"/proc/{one}/stat", "rb", buffering=0) as file:
                parent = int(file.read(512).rpartition(b")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        children.setdefault(parent, []).append(one)
    found = children.get(pid, [])
    for one in found:  # it grows meanwhile
        found += children.get(one, [])
    return found


def processes_by_namespace() -> dict[int, list[int]]:
    """Pids of all processes that are to be seen, by the inode of their process namespace."""
    found: dict[int, list[int]] = {}
    for pid in pids():
        try:
            namespace = os.stat(f"/proc/{pid}/ns/pid").st_ino
        except OSError:
            continue  # it has just ended, or is an init
        found.setdefault(namespace, []).append(pid)
    return found


def uses_more_than(limit_bytes: int, of: Iterable[int]) -> bool:
    """Compare the resident memory first: cheap, and never less than the proportional one."""
    if sum(map(resident_bytes, of)) <= limit_bytes:
        return False
    return proportional_bytes(of) > limit_bytes


def proportional_bytes(of: Iterable[int]) -> int:
    """Pages shared by n processes count 1/n: a fork's copy-on-write pages are not counted again."""
    return sum(map(_proportional_bytes, of))


def files_in_memory_bytes(pid: int) -> int:
    """What lies in the directories of a process's world that are memory; 0 when it has ended."""
    taken_bytes = 0
    for name in ("tmp", "dev/shm"):
        with contextlib.suppress(OSError):
            of = os.statvfs(os.path.join("/proc", str(pid), "root", name))
            taken_bytes += (of.f_blocks - of.f_bfree) * of.f_frsize
    return taken_bytes


def resident_bytes(pid: int) -> int:
    """Pages in memory of one process, shared or not; 0 when it has ended."""
    try:
        with open(f"/proc/{pid}/statm", "rb", buffering=0) as file:
            return int(file.read(256).split()[1]) * _PAGE_BYTES
    except OSError:
        return 0  # it has just ended


def _proportional_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
    except PermissionError:
        return resident_bytes(pid)  # its program may be executed but not read
    except OSError:
        return 0  # it has just ended
    fields = (line.split() for line in lines)
    return sum(int(field[1]) << 10 for field in fields if field[0] in (b"Pss:", b"SwapPss:"))
