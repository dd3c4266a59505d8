"""The Linux calls that Python 3.11 lacks, by ctypes. Standard library only: the fork server imports it."""

import _socket
import array
import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18

_MADV_COLLAPSE = 25
_HUGE_PAGE_BYTES = 2 << 20
_MNT_DETACH = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY_NOSUID_NODEV = 0x1 | 0x2 | 0x4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2
NO_CAPABILITIES = struct.pack("Ii", 0x20080522, 0), bytes(24)
"""Arguments of capset(2); the number is its version 3."""

_SYS_MOUNT_SETATTR = 442  # the same on every architecture, as all calls since 2019
_SYS_CLOSE_RANGE = 436
PR_SET_CHILD_SUBREAPER = 36
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_VERSION = 1
_LANDLOCK_PATH_BENEATH = 1
_LANDLOCK_ALL_FILES = 0xFFFF
"""Every right on files up to ABI 5; on 6 the rights of a file system end there."""
_LANDLOCK_ALL_NETWORK = 0x3
_LANDLOCK_SCOPE_SIGNALS = 0x2
_LANDLOCK_ALL_SCOPES = 0x1 | _LANDLOCK_SCOPE_SIGNALS
"""Abstract sockets and signals; ABI 6."""
LANDLOCK_READ = 0x1 | 0x4 | 0x8
"""Execute, read files, read directories."""
LANDLOCK_READ_FILE = 0x4
LANDLOCK_WRITE_FILE = 0x2
LANDLOCK_ANY = _LANDLOCK_ALL_FILES

_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_PARENT = 0x8000
_CLONE_SIBLING = [
    ctypes.c_long(word)
    for word in (_SYS_CLONE.get(platform.machine(), -1), _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
]

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_lock = ctypes.PyDLL(None, use_errno=True)
"""Its calls keep Python's global lock."""


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _prctl(option: int, argument: int, what: str, *rest: int) -> None:
    padded = [*rest, 0, 0, 0][:3]
    values = [ctypes.c_ulong(value) for value in (argument, *padded)]
    _check(_libc.prctl(option, *values), what)


def machine() -> str:
    """The architecture; raises OSError for one that the sandbox has no system call numbers for."""
    name = platform.machine()
    if name not in _SYS_PIVOT_ROOT:
        raise OSError(f"no system call table for {name}; known: {', '.join(_SYS_PIVOT_ROOT)}")
    return name


def fork_sibling() -> int:
    """A fork whose child is the caller's parent's to wait for, by a process with one thread.

    Nothing is done after it in the child: where no other thread was there is nothing to repair, and Python's repairs
    of `threading` alone touch a hundred pages. The C library takes the child's thread for the caller's, so its id must
    be the same in its own namespace. The child seeds its random numbers itself.
    """
    pid: int = _libc_with_lock.syscall(*_CLONE_SIBLING)
    return _check(pid, "clone")


def system_call(number: int, *arguments: int) -> int:
    """Any system call, by its number."""
    words = [ctypes.c_ulong(word) for word in (number, *arguments)]
    return _check(_libc.syscall(*words), f"system call {number}")


def make_executable(address: int, size: int) -> None:
    """Let memory be executed, and written no more."""
    readable_executable = ctypes.c_int(0x5)
    pointer, length = ctypes.c_void_p(address), ctypes.c_size_t(size)
    _check(_libc.mprotect(pointer, length, readable_executable), "mprotect")


def unshare(flags: int) -> None:
    """Leave the namespaces named by the CLONE_NEW* flags for fresh ones."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, kind: int) -> None:
    """Enter the namespace that the file descriptor names."""
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    arguments = [part.encode() or None for part in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
    _check(result, f"mount {kind or source} on {target}")


def unmount(path: str) -> None:
    """umount2(2), also when it is in use."""
    _check(_libc.umount2(path.encode(), _MNT_DETACH), f"umount2 {path}")


def make_read_only(path: str, *, recursive: bool) -> None:
    """Make a mount read-only, without devices or set-uid programs; `recursive` covers mounts inside it."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, len(attributes)
    )
    _check(result, f"mount_setattr {path}")


def pivot_root(new_root: str) -> None:
    """Make `new_root` (a mount) the root and let go of the old one."""
    os.chdir(new_root)
    _check(_libc.syscall(_SYS_PIVOT_ROOT[machine()], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2 of the old root")
    os.chdir("/")


def use_huge_pages() -> None:
    """Move this process's memory to huge pages where the kernel can: a fork then copies a 512th of the page table."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        fields = [line.split() for line in file]
    for address, permissions, *rest in fields:
        if permissions != "rw-p" or rest[3:] not in ([], ["[heap]"]):
            continue
        first, end = (int(bound, 16) for bound in address.split("-"))
        first = -(-first // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        for at in range(first, end - _HUGE_PAGE_BYTES + 1, _HUGE_PAGE_BYTES):
            # older kernels refuse, and so does a range that is not in use; either way it only stays slower
            _libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(_HUGE_PAGE_BYTES), _MADV_COLLAPSE)


def landlock_abi() -> int:
    """The version of Landlock's interface; 0 where the kernel has none or it is switched off."""
    version: int = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    return max(0, version)


def landlock(rights: dict[int, int]) -> None:
    """Let this process reach no file but by these rights (by descriptors of what they are for), for good.

    Nor TCP, nor abstract sockets and processes outside. Asks for ABI 6; needs no_new_privs.
    """
    ruleset = _landlock_ruleset(_LANDLOCK_ALL_FILES, _LANDLOCK_ALL_NETWORK, _LANDLOCK_ALL_SCOPES)
    for fd, allowed in rights.items():
        rule = struct.pack("=Qi", allowed, fd)
        added = _libc.syscall(_SYS_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0)
        _check(added, "landlock rule")
    _landlock_restrict(ruleset)


def keep_signals_inside() -> None:
    """Let this process and what comes from it signal nobody else: `kill(-1)` ends what comes from it, all at once.

    Asks for Landlock's ABI 6.
    """
    _prctl(PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    _landlock_restrict(_landlock_ruleset(0, 0, _LANDLOCK_SCOPE_SIGNALS))


def _landlock_ruleset(files: int, network: int, scopes: int) -> int:
    attributes = struct.pack("QQQ", files, network, scopes)
    return _check(
        _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0), "landlock"
    )


def _landlock_restrict(ruleset: int) -> None:
    _check(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def collect_orphans() -> None:
    """Become the parent of what this process's descendants leave behind."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def sethostname(name: str) -> None:
    """Name the UTS namespace."""
    _check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def die_with_parent() -> None:
    """Ask for SIGKILL when the parent dies. A later change of user undoes it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, "PR_SET_PDEATHSIG")


def set_dumpable(dumpable: bool) -> None:
    """Let processes of the same user look into this one through /proc, or not."""
    _prctl(PR_SET_DUMPABLE, int(dumpable), "PR_SET_DUMPABLE")


def drop_capabilities() -> None:
    """Give up every capability, also for programs executed later, and the way back to any."""
    prctl, drop = _libc.prctl, PR_CAPBSET_DROP
    capability = 0
    while prctl(drop, capability, 0, 0, 0) == 0:  # until past the last one that this kernel knows
        capability += 1
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, "PR_CAP_AMBIENT")
    _check(_libc.capset(NO_CAPABILITIES[0], NO_CAPABILITIES[1]), "capset")
    _prctl(PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


class FilterProgram(ctypes.Structure):
    """The kernel's struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def install_seccomp(program: bytes) -> None:
    """Filter this process's system calls, for good. `program` is BPF, 8 bytes an instruction."""
    prepared = FilterProgram(len(program) // 8, program)
    pointer = ctypes.c_ulong(ctypes.addressof(prepared))
    _check(
        _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), pointer, 0, 0),
        "PR_SET_SECCOMP",
    )


def receive_fds(channel: _socket.socket, size_bytes: int, most: int) -> tuple[bytes, list[int]]:
    """A message and its descriptors, which no program executed later inherits.

    `socket.recv_fds` leaves them open for every child: it drops the flag that it is given. Raises OSError, and drops
    the message, where this process may not open so many more: the kernel hands over those that it may.
    """
    received = array.array("i")
    room = socket.CMSG_SPACE(most * received.itemsize)
    message, ancillary, flags, _ = channel.recvmsg(size_bytes, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
    if flags & socket.MSG_CTRUNC:
        for fd in received:
            os.close(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return message, list(received)


def limit(name: str, soft: int, hard: int) -> None:
    """setrlimit(2), of RLIMIT_ and the name. Raises OSError, which says what this host allows."""
    number = getattr(resource, f"RLIMIT_{name}")
    try:
        resource.setrlimit(number, (soft, hard))
    except ValueError:
        allowed = resource.getrlimit(number)[1]
        raise OSError(f"RLIMIT_{name}: {hard} are asked for, {allowed} allowed here") from None


def close_all_but(keep: set[int]) -> None:
    """Close every file descriptor that is not in `keep`."""
    first = 0
    for fd in [*sorted(keep), 1 << 31]:
        if first < fd:
            _check(_libc.syscall(_SYS_CLOSE_RANGE, first, fd - 1, 0), "close_range")
        first = fd + 1


def write_file(path: str, text: str) -> None:
    """Write a file of /proc in one write(2), as the kernel asks."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def map_user(inside: int, outside_uid: int, outside_gid: int) -> None:
    """In a new user namespace: be `inside` (user and group) here, and nobody else."""
    with contextlib.suppress(PermissionError):  # denied already by a namespace further out
        write_file("/proc/self/setgroups", "deny")
    write_file("/proc/self/uid_map", f"{inside} {outside_uid} 1")
    write_file("/proc/self/gid_map", f"{inside} {outside_gid} 1")
