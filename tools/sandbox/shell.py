"""A bash session: what the shell runs, and what it is told. Standard library only.

Bash is interactive, since only then does SIGINT end the running script and not the shell. It reads command lines from
`lines`; `command_line` makes one that evaluates a script at top level (so `declare` is global, and `$?` is the last
script's) and answers on `replies`. A shell that exits starts a new one in its place, by a trap on EXIT.

    client ──lines──► bash ──replies──► client     (pipes)
"""

import os
import re
import shlex
import signal
from typing import NoReturn

RC_PATH = "/etc/session.bashrc"
_REPLIES, _LINES = 60, 61
MINIMUM_FILES = 64
"""Of Limits.files: the pipes have high numbers, out of the way of scripts."""

_NO_TERMINAL = re.compile(
    rb"bash: \[\d+: \d+ \(255\)\] tcsetattr: Inappropriate ioctl for device\n"
)

READY_LINE = b"__reply\n"


def arguments(rc_path: str) -> list[str]:
    """How bash is started."""
    return ["bash", "--noprofile", "--noediting", "--rcfile", rc_path, "-i"]


def start_up_file(rc_path: str) -> str:
    """The text of the file at that path."""
    return rf"""PS1= PS2= PROMPT_COMMAND=
set +o history +o histexpand
__status=0 __run=${{__run:-0}}
__again() {{ return "$__status"; }}
__reply() {{ printf '{{"run":%d,"exit_code":%d%s}}\n' "$__run" "$__status" "${{1-}}" >&{_REPLIES}; }}
__left() {{
    __status=$?
    __reply ',"restarted":true'
    export __run
    exec {shlex.join(arguments(rc_path))} <&{_LINES} 2>/dev/null
}}
trap __left EXIT
exec 2>&1
"""


def command_line(run: int, script: str) -> bytes:
    """Run the script; its answer carries the number."""
    quoted = shlex.quote(script.replace("\0", ""))
    line = f"__run={run}; __again; eval {quoted} </dev/null; __status=$?; __reply\n"
    return line.encode("utf-8", "backslashreplace")


def interrupted_line(run: int) -> bytes:
    """Answer for a script that SIGINT has ended."""
    return f"__status=130; __run={run}; __reply\n".encode()


def without_noise(output: bytes) -> bytes:
    """The output without bash's complaint, each time a signal ends a program, that there is no terminal to reset."""
    return _NO_TERMINAL.sub(b"", output)


def become(lines_fd: int, replies_fd: int, rc_path: str = RC_PATH) -> NoReturn:
    """Turn this process into the shell. Raises OSError."""
    os.dup2(replies_fd, _REPLIES)
    os.dup2(lines_fd, _LINES)
    os.close(replies_fd)
    os.close(lines_fd)
    os.dup2(_LINES, 0)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(
            number, signal.SIG_DFL
        )  # Python ignores them, and programs would inherit that
    # until the start-up file says so nothing is shown: bash complains that there is no terminal
    null_fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_fd, 2)
    os.close(null_fd)
    os.execvp("bash", arguments(rc_path))
