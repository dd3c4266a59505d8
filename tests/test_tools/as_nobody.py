"""Run pytest as nobody: `python as_nobody.py FILE…`, started by root.

An interpreter or a checkout below a directory that others may not enter (a 0700 home) is shown again, in a mount
namespace of this process alone.
"""

import os
import sys
from pathlib import Path

from tools.sandbox import linux, root


def show(path: Path) -> None:
    """Let everybody reach the path."""
    for parent in reversed(path.parents):
        if not parent.stat().st_mode & 0o001:
            fd = os.open(path, os.O_PATH)
            linux.mount("tmpfs", str(parent), "tmpfs", options="mode=755")
            root.bind(fd, str(path))
            os.close(fd)
            return


linux.unshare(linux.CLONE_NEWNS)
linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
for place in {sys.base_prefix, sys.prefix, str(Path(linux.__file__).parents[2])}:
    show(Path(place))
os.setgroups([])
os.setresgid(root.NOBODY, root.NOBODY, root.NOBODY)
os.setresuid(root.NOBODY, root.NOBODY, root.NOBODY)
os.environ["HOME"] = "/tmp"
pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]
os.execv(sys.executable, pytest)
