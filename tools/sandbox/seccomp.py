"""The system calls that sandboxed code may not make, as a BPF program. Standard library only.

Legend: a rule compares the call's number and returns; anything unmatched is allowed. File access, memory and
processes are bounded by namespaces and limits; what is denied here would widen the kernel's surface, make new
namespaces, or take memory that no limit counts.
"""

import struct
from collections.abc import Sequence

_DENIED = {
    # name: (x86_64, aarch64)
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    # the kernel itself
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    # few for the whole machine, or for all of one user
    "io_setup": (206, 0),
    "inotify_init1": (294, 26),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    # memory outside any process, which the watcher could not see
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
_DENIED_WITHOUT_NAMESPACES = {
    # other processes of the same user are in reach
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "process_mrelease": (448, 448),
    # Landlock lets connect(2) through to any socket in the file system
    "connect": (42, 203),
    "bind": (49, 200),
    # and it knows only contents of files, not what is said about them
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "fchown": (93, 55),
    "fchownat": (260, 54),
}
_IGNORED_WITHOUT_NAMESPACES = {
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "utimensat": (280, 88),
}
_ONLY_X86_DENIED = {"inotify_init": 253}
_ONLY_X86_DENIED_WITHOUT_NAMESPACES = {"chown": 92, "lchown": 94}
_ONLY_X86_IGNORED = {"chmod": 90, "utime": 132, "utimes": 235, "futimesat": 261}
_PRLIMIT = (302, 261)
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_SOCKET = (41, 198)
_SOCKET_PAIR = (53, 199)
_SET_SOCKET_OPTION = (54, 208)
_PRCTL = (157, 167)
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_MACHINES = ("x86_64", "aarch64")

_CLONE_NEW_ANY = 0x7E020000
_AF_UNIX = 1
_SOCK_DGRAM, _SOCK_RAW = 2, 3
_SOCKET_TYPE_BITS = 0xF
_SOL_SOCKET, _SO_SNDBUF = 1, 7
_PR_SET_DUMPABLE = 4
_X32 = 0x40000000

# of struct seccomp_data
_OFFSET_NUMBER = 0
_OFFSET_ARCH = 4
_OFFSET_FIRST_ARGUMENT = 16
_OFFSET_SECOND_ARGUMENT = 24
_OFFSET_THIRD_ARGUMENT = 32

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
ALLOW = 0x7FFF0000
KILL = 0x80000000
EPERM = 0x00050000 | 1
ENOSYS = 0x00050000 | 38
NOTHING = 0x00050000

_REFUSE_DATAGRAMS = (
    # such a unix socket sends to any address without connect(2)
    (_LOAD, 0, 0, _OFFSET_SECOND_ARGUMENT),
    (_AND, 0, 0, _SOCKET_TYPE_BITS),
    (_EQUAL, 1, 0, _SOCK_DGRAM),
    (_EQUAL, 0, 1, _SOCK_RAW),
    (_RETURN, 0, 0, EPERM),
    (_LOAD, 0, 0, _OFFSET_NUMBER),
)

_IGNORE_LARGE_BUFFERS = (
    # what waits in a socket is memory that the watcher cannot see: it stays at the default
    (_LOAD, 0, 0, _OFFSET_SECOND_ARGUMENT),
    (_EQUAL, 0, 3, _SOL_SOCKET),
    (_LOAD, 0, 0, _OFFSET_THIRD_ARGUMENT),
    (_EQUAL, 0, 1, _SO_SNDBUF),
    (_RETURN, 0, 0, NOTHING),
    (_LOAD, 0, 0, _OFFSET_NUMBER),
)


def denied(machine: str, *, namespaces: bool = True) -> dict[str, int]:
    """Name and number of each call that is denied whatever its arguments."""
    column = _MACHINES.index(machine)
    tables = [_DENIED] if namespaces else [_DENIED, _DENIED_WITHOUT_NAMESPACES]
    found = {name: numbers[column] for table in tables for name, numbers in table.items()}
    if machine == "x86_64":
        found |= _ONLY_X86_DENIED
        found |= {} if namespaces else _ONLY_X86_DENIED_WITHOUT_NAMESPACES
    return found


def ignored(machine: str) -> dict[str, int]:
    """Name and number of each call that does nothing, where there are no namespaces, and says that it did."""
    column = _MACHINES.index(machine)
    found = {name: numbers[column] for name, numbers in _IGNORED_WITHOUT_NAMESPACES.items()}
    return found | (_ONLY_X86_IGNORED if machine == "x86_64" else {})


def program(machine: str, *, namespaces: bool = True) -> bytes:
    """The filter for `x86_64` or `aarch64`, 8 bytes an instruction.

    Without namespaces around the code it also denies what would reach files and processes of the same user.
    """
    column = _MACHINES.index(machine)
    code: list[bytes] = []

    def add(operation: int, if_true: int, if_false: int, operand: int) -> None:
        code.append(struct.pack("HBBI", operation, if_true, if_false, operand))

    def add_for(call: int, rules: Sequence[tuple[int, int, int, int]]) -> None:
        add(_EQUAL, 0, len(rules), call)
        for rule in rules:
            add(*rule)

    def refuse_unless_argument(call: int, test: int, operand: int, *, refuse_if: bool) -> None:
        add(_EQUAL, 0, 4, call)
        add(_LOAD, 0, 0, _OFFSET_FIRST_ARGUMENT)
        add(test, int(not refuse_if), int(refuse_if), operand)
        add(_RETURN, 0, 0, EPERM)
        add(_LOAD, 0, 0, _OFFSET_NUMBER)

    add(_LOAD, 0, 0, _OFFSET_ARCH)
    add(_EQUAL, 1, 0, _AUDIT_ARCH[column])
    add(_RETURN, 0, 0, KILL)  # 32-bit calls have other numbers
    add(_LOAD, 0, 0, _OFFSET_NUMBER)
    if machine == "x86_64":
        add(_AT_LEAST, 0, 1, _X32)
        add(_RETURN, 0, 0, EPERM)
    add(_EQUAL, 0, 1, _CLONE3[column])
    add(_RETURN, 0, 0, ENOSYS)  # its flags are behind a pointer; libc falls back to clone
    for number in denied(machine, namespaces=namespaces).values():
        add(_EQUAL, 0, 1, number)
        add(_RETURN, 0, 0, EPERM)
    if not namespaces:
        for number in ignored(machine).values():
            add(_EQUAL, 0, 1, number)
            add(_RETURN, 0, 0, NOTHING)
        refuse_unless_argument(_PRLIMIT[column], _EQUAL, 0, refuse_if=False)  # only its own
        for call in (_SOCKET[column], _SOCKET_PAIR[column]):
            add_for(call, _REFUSE_DATAGRAMS)
    add_for(_SET_SOCKET_OPTION[column], _IGNORE_LARGE_BUFFERS)
    refuse_unless_argument(_CLONE[column], _ANY_BIT, _CLONE_NEW_ANY, refuse_if=True)
    refuse_unless_argument(_SOCKET[column], _EQUAL, _AF_UNIX, refuse_if=False)
    add(_EQUAL, 0, 5, _PRCTL[column])
    add(_LOAD, 0, 0, _OFFSET_FIRST_ARGUMENT)
    add(_EQUAL, 0, 3, _PR_SET_DUMPABLE)
    add(_LOAD, 0, 0, _OFFSET_SECOND_ARGUMENT)
    add(_EQUAL, 0, 1, 0)
    add(_RETURN, 0, 0, EPERM)  # the watcher cannot see the memory of such a process
    add(_RETURN, 0, 0, ALLOW)
    return b"".join(code)
