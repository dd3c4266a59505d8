"""System calls that are prepared once and made in one go. Standard library only.

In a fork of an interpreter each step of Python copies pages of it, at microseconds each; a batch copies one or two. On
x86-64 a loop of machine code makes the calls, elsewhere Python does.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Callable

from tools.sandbox import linux

SYSTEM_CALLS = {
    # name: (x86_64, aarch64)
    "write": (1, 64),
    "chdir": (80, 49),
    "prctl": (157, 167),
    "capset": (126, 91),
    "openat": (257, 56),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "rt_sigaction": (13, 134),
    "close_range": (436, 436),
}
Argument = int | bytes | ctypes.Array[ctypes.c_char] | ctypes.Structure
"""Of what is no number the address is passed."""
_COLUMNS = ("x86_64", "aarch64")
_WORDS = 8
_WORD_BYTES = 8
_END = (1 << 64) - 1
_RESULT_TO = 7
_AT_FDCWD = -100
_SIGNAL_MASK_BYTES = 8

# long *run(long (*call)[8]): zero, or the call that failed, with its error in place of its number
_LOOP = bytes.fromhex(
    "53"  # push rbx
    "4889fb"  # mov rbx, rdi
    "488b03"  # next: mov rax, [rbx]
    "4883f8ff"  # cmp rax, -1
    "743c"  # je end
    "488b7b08"  # mov rdi, [rbx+8]
    "488b7310"  # mov rsi, [rbx+16]
    "488b5318"  # mov rdx, [rbx+24]
    "4c8b5320"  # mov r10, [rbx+32]
    "4c8b4328"  # mov r8, [rbx+40]
    "4c8b4b30"  # mov r9, [rbx+48]
    "0f05"  # syscall
    "483d01f0ffff"  # cmp rax, -4095
    "7312"  # jae failed
    "488b4b38"  # mov rcx, [rbx+56]
    "4885c9"  # test rcx, rcx
    "7403"  # je +3
    "488901"  # mov [rcx], rax
    "4883c340"  # add rbx, 64
    "ebc3"  # jmp next
    "488903"  # failed: mov [rbx], rax
    "4889d8"  # mov rax, rbx
    "5bc3"  # pop rbx; ret
    "31c05bc3"  # end: xor eax, eax; pop rbx; ret
)


class Batch:
    """Calls in order, up to the first that fails; to be run once, in a fork."""

    def __init__(self) -> None:
        self._machine = linux.machine()
        self._calls: list[tuple[str, list[int]]] = []
        self._kept: list[object] = []
        """What arguments point to."""
        self._run: Callable[[int], int] = self._run_slowly

    def add(self, name: str, *arguments: Argument) -> int:
        """One more call; its place."""
        number = SYSTEM_CALLS[name][_COLUMNS.index(self._machine)]
        words = [number, *map(self._word, arguments), *[0] * 6][:_RESULT_TO]
        self._calls.append((name, [*words, 0]))
        return len(self._calls) - 1

    def _word(self, argument: Argument) -> int:
        if isinstance(argument, int):
            return argument
        kept = ctypes.create_string_buffer(argument) if isinstance(argument, bytes) else argument
        self._kept.append(kept)
        return ctypes.addressof(kept)

    def write_file(self, path: str, text: str) -> None:
        """Write a file of /proc, and leave it open."""
        opened = self.add("openat", _AT_FDCWD, path.encode(), os.O_WRONLY)
        written = self.add("write", 0, text.encode(), len(text))
        self._calls[opened][1][_RESULT_TO] = written  # made an address by `prepare`

    def prepare(self) -> None:
        """No call is added after it."""
        self._memory = (ctypes.c_uint64 * (_WORDS * (len(self._calls) + 1)))()
        self._address = ctypes.addressof(self._memory)
        for place, (_, words) in enumerate(self._calls):
            if words[_RESULT_TO]:
                first = (words[_RESULT_TO] * _WORDS + 1) * _WORD_BYTES
                words[_RESULT_TO] = self._address + first
            for index, word in enumerate(words):
                self._memory[place * _WORDS + index] = word & _END
        self._memory[len(self._calls) * _WORDS] = _END
        if self._machine == "x86_64":
            private = (
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )  # shared, one fork could write what others run
            self._code = mmap.mmap(-1, mmap.PAGESIZE, private, mmap.PROT_READ | mmap.PROT_WRITE)
            self._code.write(_LOOP)
            start = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
            linux.make_executable(start, mmap.PAGESIZE)
            self._run = ctypes.PYFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(start)

    def on_signal(self, number: int, handler: int) -> None:
        """Set what a signal does, without Python's knowing: 0 for the default, 1 for nothing."""
        action = struct.pack("4Q", handler, 0, 0, 0)
        self.add("rt_sigaction", number, action, 0, _SIGNAL_MASK_BYTES)

    def set(self, place: int, argument: int, value: int) -> None:
        """Change an argument, counted from 0, of a prepared call."""
        self._memory[place * _WORDS + 1 + argument] = value

    def run(self) -> None:
        """Make the calls. Raises OSError."""
        failed = self._run(self._address)
        if failed:
            place = (failed - self._address) // (_WORDS * _WORD_BYTES)
            error = (_END + 1) - self._memory[place * _WORDS]
            raise OSError(error, f"{self._calls[place][0]}: {os.strerror(error)}")

    def _run_slowly(self, address: int) -> int:
        place = 0
        while (number := self._memory[place]) != _END:
            words = self._memory[place : place + _WORDS]
            try:
                result = linux.system_call(number, *words[1:_RESULT_TO])
            except OSError as error:
                self._memory[place] = (_END + 1) - (error.errno or 0)
                return address + place * _WORD_BYTES
            if words[_RESULT_TO]:
                self._memory[(words[_RESULT_TO] - address) // _WORD_BYTES] = result
            place += _WORDS
        return 0
