"""Process 1 of each call's own process namespace: the smallest program there is. It sleeps for ever.

A call needs a process 1 that outlives the code and collects orphans. Two forks of a warm interpreter would copy its
page tables twice; this is one page, and starting it costs a tenth of such a fork. Ignoring SIGCHLD lets the kernel
collect orphans by itself, and the namespace ends when the server kills this process. It is not dumpable, so the code
sees nothing of it in /proc.
"""

import struct

_HEADERS_BYTES = 64 + 56
_LOAD_ADDRESS = 0x400000
_IGNORE_SIGCHLD = struct.pack("<4Q", 1, 0, 0, 0)
"""The kernel's struct sigaction: SIG_IGN, no flags, no restorer, no mask."""

_CODE = {
    "x86_64": bytes.fromhex(
        "bf11000000"  # mov edi, SIGCHLD
        "488d3529000000"  # lea rsi, [rip + 41]: the sigaction behind the code
        "31d2"  # xor edx, edx
        "41ba08000000"  # mov r10d, 8: bytes of a signal mask
        "b80d000000"  # mov eax, rt_sigaction
        "0f05"  # syscall
        "bf04000000"  # mov edi, PR_SET_DUMPABLE
        "31f6"  # xor esi, esi
        "b89d000000"  # mov eax, prctl
        "0f05"  # syscall
        "b822000000"  # mov eax, pause
        "0f05"  # syscall
        "ebf7"  # jmp to the pause
        "909090"
    ),
    "aarch64": struct.pack(
        "<18I",
        0xD2800220,  # mov x0, SIGCHLD
        0x10000221,  # adr x1, #68: the sigaction behind the code
        0xD2800002,  # mov x2, 0
        0xD2800103,  # mov x3, 8: bytes of a signal mask
        0xD28010C8,  # mov x8, rt_sigaction (134)
        0xD4000001,  # svc 0
        0xD2800080,  # mov x0, PR_SET_DUMPABLE
        0xD2800001,  # mov x1, 0
        0xD28014E8,  # mov x8, prctl (167)
        0xD4000001,  # svc 0
        0xD2800000,  # mov x0, 0: no descriptors
        0xD2800001,  # mov x1, 0
        0xD2800002,  # mov x2, 0: no time-out
        0xD2800003,  # mov x3, 0: no mask
        0xD2800004,  # mov x4, 0
        0xD2800928,  # mov x8, ppoll (73)
        0xD4000001,  # svc 0
        0x17FFFFF9,  # b to the ppoll
    ),
}
_ELF_MACHINE = {"x86_64": 62, "aarch64": 183}


def program(machine: str) -> bytes:
    """An ELF executable for `x86_64` or `aarch64`; its system calls are Linux's stable interface."""
    code = _CODE[machine] + _IGNORE_SIGCHLD
    size = _HEADERS_BYTES + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,  # executable
        _ELF_MACHINE[machine],
        1,
        _LOAD_ADDRESS + _HEADERS_BYTES,
        64,  # the one segment's header follows
        0,
        0,
        64,
        56,
        1,
        0,
        0,
        0,
    )
    readable_executable = 5
    segment = struct.pack(
        "<IIQQQQQQ", 1, readable_executable, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 1 << 16
    )
    return header + segment + code
