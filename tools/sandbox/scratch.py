"""A job's own folder, where no file system of its own limits it: is it too full, and away with it.

The code nests folders deeper than any path reaches, takes from them the right to be read, and writes to files that it
has deleted. Nothing here recurses, follows a link or gives up. Standard library only.
"""

import itertools
import math
import os
import stat
from collections.abc import Iterable

from tools.sandbox import watch
from tools.sandbox.world import most_files

_BLOCK_BYTES = 512
_OWNER_ONLY = 0o700
_DEEPEST = 1024
"""Characters of a path: further in, looking takes too long, and in the end is not possible."""


def takes_more_than(disk_bytes: int, folder: str, pids: Iterable[int]) -> bool:
    """Whether there is more in it, or in deleted files that the processes have open.

    Too many files are too much, and so are folders that are too deep.
    """
    total = sum(map(_deleted_bytes, pids))
    left = most_files(disk_bytes)
    folders = [folder]
    while folders:
        here = folders.pop()
        if len(here) > len(folder) + _DEEPEST:
            return True
        try:
            for entry in _entries(here):
                left -= 1
                total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
        except OSError:
            continue  # it has just been deleted
        if left < 0 or total > disk_bytes:
            return True
    return False


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:  # the code's doing
        os.chmod(folder, _OWNER_ONLY)
        with os.scandir(folder) as entries:
            return list(entries)


def _deleted_bytes(pid: int) -> float:
    found: dict[tuple[int, int], int] = {}
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            file = os.stat(f"/proc/{pid}/fd/{name}")
            if stat.S_ISREG(file.st_mode) and not file.st_nlink:
                found[file.st_dev, file.st_ino] = file.st_blocks * _BLOCK_BYTES
    except PermissionError:  # it has ended; or its program may not be read, and nobody sees more
        return math.inf if watch.resident_bytes(pid) else 0
    except OSError:
        pass  # it has just ended, or closed a file
    return sum(found.values())


def remove(folder: str) -> None:
    """Delete it, when no process is left that could change it. Raises OSError."""
    numbers = itertools.count()
    folders = [folder]
    while folders:
        here = folders.pop()
        os.chmod(here, _OWNER_ONLY)
        for entry in _entries(here):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            # what is in a folder goes beside the outermost, so that no path grows
            os.chmod(entry.path, _OWNER_ONLY)
            beside = f"{folder}.{next(numbers)}"
            os.rename(entry.path, beside)
            folders.append(beside)
        os.rmdir(here)
