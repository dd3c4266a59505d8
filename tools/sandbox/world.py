"""The world of one call, made from inside by the process that will run its code. Standard library only."""

import ctypes
import os
import resource
import signal
from typing import Any

from tools.sandbox import linux, root, seccomp
from tools.sandbox.batch import Batch

SHARED_MEMORY_BYTES = 16 << 20
_LEAST_TMP_FILES, _SHARED_FILES = 8192, 64
_OPTIONS_BYTES = 128
_LAST_DESCRIPTOR = (1 << 32) - 1
_BYTES_OF_TMP_FILE = 8192
_MOUNT_FLAGS = linux.MS_NOSUID | linux.MS_NODEV


def most_files(disk_bytes: int) -> int:
    """How many files and folders the code may have, where they may take so much room."""
    return max(_LEAST_TMP_FILES, disk_bytes // _BYTES_OF_TMP_FILE)


def _options(size_bytes: int, files: int) -> bytes:
    return f"size={size_bytes},nr_inodes={files},mode=1777".encode()


class World:
    """What all calls' worlds have in common, prepared once."""

    def __init__(self) -> None:
        self._below_tmp = [path for path in root.visible_paths() if path.startswith("/tmp/")]
        self._own_bytes = 0
        self._options = ctypes.create_string_buffer(_OPTIONS_BYTES)
        self._leave, self._scratch, self._settle = Batch(), Batch(), Batch()
        self._leave.add("setns", 0, linux.CLONE_NEWNET)
        self._leave.add("unshare", linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
        shared = _options(SHARED_MEMORY_BYTES, _SHARED_FILES)
        for path, options in ((b"/tmp", self._options), (b"/dev/shm", shared)):
            self._scratch.add("mount", b"tmpfs", path, b"tmpfs", _MOUNT_FLAGS, options)
        self._below_stage, self._above_stage = self._prepare_settling(self._settle)
        for batch in (self._leave, self._scratch, self._settle):
            batch.prepare()

    def _prepare_settling(self, batch: Batch) -> tuple[int, int]:
        """All that comes after the scratch mounts; where in it descriptors are closed."""
        batch.add("mount", b"proc", b"/proc", b"proc", root.PROC_FLAGS)
        batch.add("chdir", b"/tmp")
        batch.write_file("/proc/self/oom_score_adj", "1000")  # before anyone outside
        # a user namespace of its own, after the mounts: they belong to the server's, and processes are counted apart
        batch.add("unshare", linux.CLONE_NEWUSER)
        for kind in ("uid", "gid"):
            batch.write_file(f"/proc/self/{kind}_map", f"{root.NOBODY} {root.NOBODY} 1")
        with open("/proc/sys/kernel/cap_last_cap", encoding="utf-8") as file:
            last = int(file.read())
        for capability in range(last + 1):
            batch.add("prctl", linux.PR_CAPBSET_DROP, capability)
        batch.add("prctl", linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_CLEAR_ALL)
        batch.add("capset", *linux.NO_CAPABILITIES)
        batch.add("prctl", linux.PR_SET_NO_NEW_PRIVS, 1)
        # it can be measured, and its own programs may look at it
        batch.add("prctl", linux.PR_SET_DUMPABLE, 1)
        program = seccomp.program(linux.machine())
        filter_program = linux.FilterProgram(len(program) // 8, program)
        batch.on_signal(signal.SIGCHLD, 0)
        batch.add("prctl", linux.PR_SET_SECCOMP, linux.SECCOMP_MODE_FILTER, filter_program)
        return batch.add("close_range", 3, 0), batch.add("close_range", 0, _LAST_DESCRIPTOR)

    def mount_scratch(self, disk_bytes: int) -> None:
        """An empty /tmp and /dev/shm in this mount namespace, and in them what was below /tmp to be seen."""
        below_tmp = {path: os.open(path, os.O_PATH) for path in self._below_tmp}
        self._options.value = _options(disk_bytes, most_files(disk_bytes))
        self._scratch.run()
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

    def enter(self, disk_bytes: int, net_fd: int, stage_fd: int) -> None:
        """Leave the server's world for good, with this network namespace and no other descriptor than the stage's."""
        self._leave.set(0, 0, net_fd)
        self._leave.run()
        self.mount_scratch(disk_bytes)
        self._settle.set(self._below_stage, 1, stage_fd - 1)
        self._settle.set(self._above_stage, 0, stage_fd + 1)
        self._settle.run()

    def limit(self, limits: dict[str, Any], cpu_s: tuple[int, int]) -> None:
        """Set the limits that the kernel keeps for each process; `cpu_s` is the soft and the hard one.

        Raises OSError.
        """
        address_space = limits["process_memory_bytes"] + self._own_bytes
        for name, soft, hard in (
            ("AS", address_space, address_space),
            ("CPU", *cpu_s),
            ("FSIZE", limits["file_bytes"], limits["file_bytes"]),
            ("NOFILE", limits["files"], limits["files"]),
            ("NPROC", limits["processes"], limits["processes"]),
            ("CORE", 0, 0),
        ):
            linux.limit(name, soft, hard)
