"""The filter, run as the kernel would, also for an architecture that is not here."""

import struct

import pytest

from tools.sandbox import seccomp


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_denies_what_it_lists(machine: str, arch: int) -> None:
    """Run as the kernel would: denied calls, new namespaces, network sockets, large buffers, foreign architectures."""
    program = seccomp.program(machine)
    clone, socket_call, prctl = {"x86_64": (56, 41, 157), "aarch64": (220, 198, 167)}[machine]

    def verdict(number: int, *arguments: int, arch: int = arch) -> int:
        return interpret(program, number, arch, arguments)

    for name, number in seccomp.denied(machine).items():
        assert verdict(number) == seccomp.EPERM, name
    assert verdict(63 if machine == "aarch64" else 0, 0) == seccomp.ALLOW  # read
    assert verdict(0, arch=0x40000003) == seccomp.KILL  # i386
    assert verdict(435) == seccomp.ENOSYS
    assert verdict(clone, 0x01200011) == seccomp.ALLOW  # fork
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(clone, flag | 17) == seccomp.EPERM
    assert verdict(socket_call, 1) == seccomp.ALLOW
    for family in (0, 2, 10, 16, 17, 38, 40):
        assert verdict(socket_call, family) == seccomp.EPERM
    set_option = {"x86_64": 54, "aarch64": 208}[machine]
    for level, option, expected in (
        (1, 7, seccomp.NOTHING),  # SO_SNDBUF
        (1, 2, seccomp.ALLOW),
        (6, 7, seccomp.ALLOW),
    ):
        assert verdict(set_option, 5, level, option) == expected
    assert verdict(prctl, 4, 0) == seccomp.EPERM
    assert verdict(prctl, 4, 1) == verdict(prctl, 15, 0) == seccomp.ALLOW


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_without_namespaces_more_is_denied(machine: str) -> None:
    """Sockets with names or for datagrams, others' limits, and what is said about files; the rest is as it was."""
    program = seccomp.program(machine, namespaces=False)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    prlimit = {"x86_64": 302, "aarch64": 261}[machine]
    denied = seccomp.denied(machine, namespaces=False)
    assert denied.items() >= seccomp.denied(machine).items()
    for number in denied.values():
        assert interpret(program, number, arch, ()) == seccomp.EPERM
    for number in seccomp.ignored(machine).values():
        assert interpret(program, number, arch, ()) == seccomp.NOTHING
    assert interpret(program, prlimit, arch, (0,)) == seccomp.ALLOW
    assert interpret(program, prlimit, arch, (4711,)) == seccomp.EPERM
    socket_call, socket_pair = {"x86_64": (41, 53), "aarch64": (198, 199)}[machine]
    non_blocking = 0o4000
    for call in (socket_call, socket_pair):
        for kind, allowed in ((1, True), (2, False), (3, False), (5, True)):
            verdict = seccomp.ALLOW if allowed else seccomp.EPERM
            assert interpret(program, call, arch, (1, kind | non_blocking)) == verdict
    assert not set(denied.values()) & set(seccomp.ignored(machine).values())


def interpret(program: bytes, number: int, arch: int, arguments: tuple[int, ...]) -> int:
    """The few BPF instructions that the filter is made of."""
    data = struct.pack("IIQ6Q", number, arch, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
    accumulator = at = 0
    while True:
        operation, if_true, if_false, operand = struct.unpack_from("HBBI", program, at * 8)
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("I", data, operand)
        elif operation == 0x06:
            return operand
        elif operation == 0x54:
            accumulator &= operand
        else:
            holds = {
                0x15: accumulator == operand,
                0x35: accumulator >= operand,
                0x45: bool(accumulator & operand),
            }[operation]
            at += if_true if holds else if_false
