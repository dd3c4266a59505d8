"""The world of one call, made from inside by the process that will run its code. Standard library only."""

import os
import resource
from typing import Any

from tools.sandbox import linux, root, seccomp

SHARED_MEMORY_BYTES = 16 << 20
_TMP_FILES = 8192
_MOUNT_FLAGS = linux.MS_NOSUID | linux.MS_NODEV


class World:
    """What all calls' worlds have in common, prepared once."""

    def __init__(self) -> None:
        self._filter = seccomp.program(linux.machine())
        self._below_tmp = [path for path in root.visible_paths() if path.startswith("/tmp/")]
        self._own_bytes = 0

    def mount_scratch(self, disk_bytes: int) -> None:
        """An empty /tmp and /dev/shm in this mount namespace."""
        below_tmp = {path: os.open(path, os.O_PATH) for path in self._below_tmp}
        size = f"size={disk_bytes},nr_inodes={_TMP_FILES},mode=1777"
        linux.mount("tmpfs", "/tmp", "tmpfs", _MOUNT_FLAGS, size)
        size = f"size={SHARED_MEMORY_BYTES},nr_inodes=64,mode=1777"
        linux.mount("tmpfs", "/dev/shm", "tmpfs", _MOUNT_FLAGS, size)
        for path, fd in below_tmp.items():
            root.bind(fd, path)
            os.close(fd)

    def unmount_scratch(self) -> None:
        """Undo mount_scratch."""
        for path in ("/tmp", "/dev/shm"):
            linux.unmount(path)

    def measure(self) -> None:
        """Take this process's address space for what every call starts with."""
        with open("/proc/self/statm", "rb") as file:
            self._own_bytes = int(file.read().split()[0]) * resource.getpagesize()

    def enter(self, disk_bytes: int, net_fd: int) -> None:
        """Leave the server's world for good, with the network namespace that is given."""
        linux.setns(net_fd, linux.CLONE_NEWNET)
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
        self.mount_scratch(disk_bytes)
        root.mount_proc()
        os.chdir("/tmp")
        linux.write_file("/proc/self/oom_score_adj", "1000")  # before anyone outside
        # a user namespace of its own, after the mounts: they belong to the server's, and processes are counted apart
        linux.unshare(linux.CLONE_NEWUSER)
        linux.map_user(root.NOBODY, root.NOBODY, root.NOBODY)
        linux.drop_capabilities()
        linux.set_dumpable(True)  # it can be measured, and its own programs may look at it
        linux.install_seccomp(self._filter)

    def limit(self, limits: dict[str, Any], cpu_s: tuple[int, int]) -> None:
        """Set the limits that the kernel keeps for each process; `cpu_s` is the soft and the hard one."""
        address_space = limits["process_memory_bytes"] + self._own_bytes
        for limit, soft, hard in (
            (resource.RLIMIT_AS, address_space, address_space),
            (resource.RLIMIT_CPU, *cpu_s),
            (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
            (resource.RLIMIT_NOFILE, limits["files"], limits["files"]),
            (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
            (resource.RLIMIT_CORE, 0, 0),
        ):
            resource.setrlimit(limit, (soft, hard))
