"""The fork server's own world: its namespaces, and a read-only root with an interpreter and nothing of ours.

Standard library only. Visible are the system's programs and libraries, the Python installation, and the
site-packages of the interpreter that starts it; not the project, home directories, /var or /run, nor /etc but for
what finds libraries and fonts.
"""

import os
import site
import sys
import sysconfig

from tools.sandbox import init, linux, shell

NOBODY = 65534
INIT = "/init"
"""The program of init.py."""
PROC_FLAGS = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
_ROOT = "/tmp"
"""Where the new root is put together; whatever is needed from below it is opened before."""

_SYSTEM = [
    "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/share",
    "/usr/local/bin", "/usr/local/lib", "/usr/local/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts",
]  # fmt: skip
_TOP_LEVEL = ["/bin", "/sbin", "/lib", "/lib32", "/lib64"]
DEVICES = ["null", "zero", "full", "random", "urandom"]
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


def visible_paths() -> list[str]:
    """What of the host the sandbox may read, outermost first; only what exists, nothing twice."""
    wanted = [*_SYSTEM, *(path for path in _TOP_LEVEL if not os.path.islink(path))]
    for prefix in (sys.base_prefix, sys.prefix):
        wanted += [f"{prefix}/{name}" for name in ("bin", "lib", "lib64", "pyvenv.cfg")]
    paths = sysconfig.get_paths()
    wanted += [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    wanted += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        wanted.append(site.getusersitepackages())
    visible: list[str] = []
    for path in sorted({os.path.normpath(path) for path in wanted}):
        covered = any(path.startswith(f"{outer}/") for outer in visible)
        if not covered and os.path.exists(path):
            visible.append(path)
    return visible


def enter() -> None:
    """Go into a world of its own as its process 1, and return there; the caller stays outside and ends with it.

    Works for root, who becomes nobody first, and for an ordinary user. Raises OSError where the kernel refuses.
    """
    privileged = os.geteuid() == 0
    if privileged:
        # an interpreter below a 0700 home can be mounted by root only, so the root is built before root is given up;
        # as root the sandbox would own the host's files and /proc/sys, whatever its user namespace calls it
        linux.unshare(linux.CLONE_NEWNS)
        _build()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        linux.set_dumpable(
            True
        )  # else /proc/self belongs to root, and the maps below cannot be written
    uid, gid = os.getuid(), os.getgid()
    linux.unshare(
        linux.CLONE_NEWUSER
        | linux.CLONE_NEWNS
        | linux.CLONE_NEWNET
        | linux.CLONE_NEWIPC
        | linux.CLONE_NEWUTS
        | linux.CLONE_NEWPID
        | linux.CLONE_NEWCGROUP
    )
    linux.map_user(NOBODY, uid, gid)
    pid = os.fork()
    if pid:
        _wait_outside(pid)
    linux.die_with_parent()
    if not privileged:
        _build()
    mount_proc()
    linux.sethostname("sandbox")


def mount_proc() -> None:
    """A /proc of the current process namespace, over whatever is there."""
    linux.mount("proc", "/proc", "proc", PROC_FLAGS)


def _wait_outside(pid: int) -> None:
    linux.close_all_but({0, 1, 2})  # what is inherited must close when the process inside dies
    linux.die_with_parent()
    _, status = os.waitpid(pid, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _build() -> None:
    linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in visible_paths()}
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    proc = os.open("/proc", os.O_PATH)
    linux.mount("tmpfs", _ROOT, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for directory in ("tmp", "dev/shm", "proc", "etc"):
        os.makedirs(f"{_ROOT}/{directory}")
    bind(proc, f"{_ROOT}/proc")  # a /proc can be mounted only where one is to be seen
    for path in _TOP_LEVEL:
        if os.path.islink(path):
            os.symlink(os.readlink(path), f"{_ROOT}{path}")
    for path, fd in sources.items():
        bind(fd, f"{_ROOT}{path}")
        linux.make_read_only(f"{_ROOT}{path}", recursive=True)
    for name, fd in devices.items():
        bind(fd, f"{_ROOT}/dev/{name}")
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"{_ROOT}/dev/{name}")
    linux.write_file(f"{_ROOT}/etc/passwd", f"sandbox:x:{NOBODY}:{NOBODY}::/tmp:/bin/sh\n")
    linux.write_file(f"{_ROOT}/etc/group", f"sandbox:x:{NOBODY}:\n")
    linux.write_file(f"{_ROOT}{shell.RC_PATH}", shell.start_up_file(shell.RC_PATH))
    with open(f"{_ROOT}{INIT}", "wb") as file:
        file.write(init.program(linux.machine()))
    os.chmod(f"{_ROOT}{INIT}", 0o555)
    for fd in (proc, *sources.values(), *devices.values()):
        os.close(fd)
    linux.pivot_root(_ROOT)
    linux.make_read_only("/", recursive=False)


def bind(fd: int, target: str) -> None:
    """Show what the descriptor stands for at `target`, which is made."""
    source = f"/proc/self/fd/{fd}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    linux.mount(source, target, flags=linux.MS_BIND | linux.MS_REC)
