"""What attacks on a sandbox run: programs that say BREACH where they got something, and programs that take too much."""

import os
from pathlib import Path

from tools.sandbox import seccomp

PRELUDE = r'''
import ctypes, errno, glob, mmap, os, resource, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def read(path):
    with open(path, "rb") as file:
        return file.read(4096) or b"empty"

def connect(family, address):
    with socket.socket(family) as client:
        client.connect(address)
    return "connected"

def call(function, *arguments):
    """The result of a libc call; raises OSError like Python's own."""
    result = function(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def syscall(*arguments):
    return call(libc.syscall, *map(ctypes.c_long, arguments))

def nothing(*_):
    raise OSError("nothing there")

PTRACE = {"x86_64": 101, "aarch64": 117}[os.uname().machine]

def attack(step):
    """Prints BREACH where it got something."""
    try:
        got = step()
    except (OSError, ValueError, MemoryError) as error:
        print("stopped:", error)
        return
    print("BREACH:", got)
'''

# each runs in a call of its own
INTRUSIONS = {
    "host_files": """
for path in ("/etc/shadow", PRIVATE, PUBLIC, PROJECT + "/pyproject.toml", TOOLS):
    attack(lambda: read(path))
attack(lambda: set(os.listdir(PROJECT)) - {".venv"} or nothing())
""",
    "host_name": "attack(lambda: read('/etc/hostname'))",
    "loopback": "attack(lambda: connect(socket.AF_INET, ('127.0.0.1', PORT)))",
    "loopback_v6": "attack(lambda: connect(socket.AF_INET6, ('::1', PORT)))",
    "raw_sockets": """
for family in (socket.AF_PACKET, socket.AF_NETLINK, 38, 40):  # 38 AF_ALG, 40 AF_VSOCK
    attack(lambda: socket.socket(family, socket.SOCK_RAW))
""",
    "abstract_socket": "attack(lambda: connect(socket.AF_UNIX, chr(0) + ABSTRACT))",
    "environment": """
attack(lambda: any(SECRET in value for value in os.environ.values()) or nothing())
for path in glob.glob("/proc/[0-9]*/environ"):
    attack(lambda: SECRET in read(path).decode() or nothing())
""",
    "signals": """
for pid in (EXECUTOR, *range(3, 300)):
    if pid != os.getpid():
        attack(lambda: os.kill(pid, 0) or pid)
""",
    "ptrace_executor": "attack(lambda: syscall(PTRACE, 16, EXECUTOR, 0, 0))",
    "ptrace_init": "attack(lambda: syscall(PTRACE, 16, 1, 0, 0))",
    "init_memory": """
attack(lambda: open("/proc/1/mem", "r+b"))
attack(lambda: os.listdir("/proc/1/fd"))
attack(lambda: read("/proc/1/environ"))
attack(lambda: os.readlink("/proc/1/exe"))
attack(lambda: [os.kill(1, n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)] and nothing())
""",
    "shared_pages": """
def shared(line):
    permissions, path = line.split()[1], line.split()[-1]
    return permissions.endswith("s") and not path.startswith(("/usr/", "/lib"))  # a library's tables
attack(lambda: list(filter(shared, open("/proc/self/maps"))) or nothing())
""",
    "descriptors": """
attack(lambda: [fd for fd in map(int, os.listdir('/proc/self/fd')) if fd > 2 and os.fstat(fd)] or nothing())
""",
    "writes": """
for directory in ("/", "/usr/lib", "/etc", "/dev", "/proc/sys/kernel", sys.prefix + "/lib", sys.base_prefix + "/lib"):
    attack(lambda: open(directory + "/written", "w"))
for path in ("/etc/passwd", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", sys.executable, os.__file__):
    attack(lambda: os.open(path, os.O_WRONLY))
""",
    "remount": """
attack(lambda: call(libc.mount, None, b"/", None, 32 | 4096, None))
attack(lambda: call(libc.mount, b"tmpfs", b"/tmp", b"tmpfs", 0, None))
attack(lambda: call(libc.umount2, b"/proc", 2))
attack(lambda: call(libc.umount2, b"/tmp", 2))
attack(lambda: os.chroot("/tmp"))
""",
    "namespaces": """
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000):
    attack(lambda: call(libc.unshare, flag))
    attack(lambda: syscall({'x86_64': 56, 'aarch64': 220}[os.uname().machine], flag | 17, 0, 0, 0, 0))
attack(lambda: syscall(435, 0, 0))
for name in ("ipc", "mnt", "net", "pid", "user", "uts"):
    attack(lambda: call(libc.setns, os.open("/proc/1/ns/" + name, 0), 0))
""",
    "privileges": """
attack(lambda: os.setuid(0))
attack(lambda: os.setgroups([0]))
attack(lambda: os.nice(-5))
attack(lambda: os.chown("/tmp", 0, 0))
attack(lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(254, 0)))
""",
    "process_limit": "attack(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)))",
    "hidden_memory": """
attack(lambda: os.memfd_create("hidden"))
attack(lambda: syscall({'x86_64': 29, 'aarch64': 194}[os.uname().machine], 0, 1 << 26, 0o1600))
attack(lambda: call(libc.prctl, 4, 0, 0, 0, 0))  # a process that is not dumpable cannot be measured
attack(lambda: syscall(425, 8, 0))
""",
    "of_the_machine": """
context = ctypes.c_ulong(0)
attack(lambda: syscall({'x86_64': 206, 'aarch64': 0}[os.uname().machine], 1, ctypes.addressof(context)))
attack(lambda: syscall({'x86_64': 294, 'aarch64': 26}[os.uname().machine], 0))
""",
    "disk": """
def fill(directory):
    written = 0
    try:
        for number in range(99):
            with open(f"{directory}/{number}", "wb") as file:
                written += file.write(bytes(16 << 20))
    except OSError as error:
        if written > 64 << 20:
            return written
        raise
    return written
attack(lambda: fill("/tmp"))
attack(lambda: fill("/dev/shm"))
""",
    "inodes": """
def many():
    for number in range(100_000):
        os.mknod(f"/tmp/{number}")
    return number
attack(many)
""",
    "one_large_file": "attack(lambda: os.truncate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 30))",
    "ten_gigabytes": "attack(lambda: len(bytearray(10 << 30)))",
    "many_files": "attack(lambda: len([os.open('/dev/null', 0) for _ in range(5000)]))",
}

EXHAUSTIONS = {
    "fork_bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", {"wall"}),
    "sleep": ("import time\ntime.sleep(600)", {"wall"}),
    "busy": ("while True: pass", {"wall"}),
    "ignored_signals": (
        "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(99)",
        {"wall"},
    ),
    "endless_output": ("while True: print('x' * 1000)", {"output"}),
    "endless_output_of_children": (
        "import os\nfor _ in range(5): os.fork()\nwhile True: os.write(1, b'x' * 9999)",
        {"output"},
    ),
    "memory_of_many": (
        "import os, time\n"
        "for _ in range(19):\n"
        "    if os.fork() == 0: break\n"
        "block = bytearray(b'x') * (200 << 20)\n"
        "time.sleep(60)",
        {"memory"},
    ),
    "threads": (
        "import threading, time\n"
        "while True:\n"
        " try: threading.Thread(target=time.sleep, args=(99,)).start()\n"
        " except RuntimeError: pass",
        {"wall", "memory"},
    ),
    "chain_of_forks": (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    while True:\n"
        "        if os.fork(): os._exit(0)\n"
        "time.sleep(600)",
        {"wall"},
    ),
    "memory_of_an_unreadable_program": (
        "import os, shutil, subprocess\n"
        "with open(os.open('tail', os.O_CREAT | os.O_WRONLY, 0o111), 'wb') as copy:\n"
        "    copy.write(open(shutil.which('tail'), 'rb').read())\n"
        "subprocess.run('cat /dev/zero | ./tail -c 900M', shell=True)",
        {"memory"},
    ),
}

# they write without end, where nobody may look for it
HOARDS = {
    "deleted_files": """
kept = []
for number in range(8):
    kept.append(open(str(number), "wb", buffering=0))
    os.unlink(str(number))
    kept[-1].write(bytes(32 << 20))
    time.sleep(0.2)
""",
    "hidden_folder": """
os.mkdir("hidden", 0o300)
for number in range(8):
    open(f"hidden/{number}", "wb").write(bytes(32 << 20))
    time.sleep(0.2)
""",
    "deep_folders": """
for _ in range(2500):
    os.mkdir("d")
    os.chdir("d")
for number in range(8):
    open(str(number), "wb").write(bytes(32 << 20))
    time.sleep(0.2)
""",
    "many_folders": """
for number in range(50_000):
    os.mkdir(str(number))
""",
}


def intrusion(name: str, targets: tuple) -> str:
    """The program of an intrusion that goes for these targets; see conftest.py."""
    private, public, port, abstract, secret = targets
    given = {
        "PRIVATE": str(private),
        "PUBLIC": str(public),
        "PORT": port,
        "ABSTRACT": abstract,
        "SECRET": secret,
        "EXECUTOR": os.getpid(),
        "PROJECT": str(Path(seccomp.__file__).parents[2]),
        "TOOLS": seccomp.__file__,
    }
    constants = "".join(f"{key} = {value!r}\n" for key, value in given.items())
    return PRELUDE + constants + INTRUSIONS[name]
