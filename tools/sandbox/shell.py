"""A bash session: what the shell runs, and what it is told. Standard library only.

Bash is interactive, since only then does SIGINT end the running script and not the shell. It reads command lines from
`lines`; `command_line` makes one that evaluates a script at top level (so `declare` is global, and `$?` is the last
script's) and says on `replies` when it begins and how it ended. A shell that exits starts a new one in its place, by a
trap on EXIT.

SIGINT while the shell reads a line costs it the part that it has read, and it takes the rest for another line. So the
signal is sent only when the script has begun, and nothing is written before it was sent; of the one line that the
shell may be reading then, each rest is a whole command.

    client ──lines──► bash ──replies──► client     (pipes)
"""

import os
import re
import shlex
import signal
from typing import NoReturn

RC_PATH = "/etc/session.bashrc"
_REPLIES, _LINES = 60, 61
"""High numbers, out of the way of scripts; Limits.files must be above them."""

_NO_TERMINAL = re.compile(
    rb"bash: \[\d+: \d+ \(255\)\] tcsetattr: Inappropriate ioctl for device\n"
)

READY_LINE = b"__reply\n"
_UNHEARD = ">/dev/null 2>&1"


def arguments(rc_path: str) -> list[str]:
    """How bash is started."""
    return ["bash", "--noprofile", "--noediting", "--rcfile", rc_path, "-i"]


def start_up_file(rc_path: str) -> str:
    """The text of the file at that path."""
    return rf"""PS1= PS2= PROMPT_COMMAND=
set +o history +o histexpand
__status=0 __run=${{__run:-0}} __options=
__again() {{
    local last=$__status
    __status=
    __reply ',"begun":true'
    return "$last"
}}
__reply() {{ printf '{{"run":%d,"exit_code":%d%s}}\n' "$__run" "$__status" "${{1-}}" >&{_REPLIES}; }}
__end() {{
    __status=$1 __options=
    case $- in *x*) __options='set -x;';; esac
    set +vx
}}
__rest() {{
    [[ $__status ]] || __end "$1"
    PS0= PS1= PS2=
    unset -v PROMPT_COMMAND
    __reply
}}
__left() {{
    __status=$?
    __reply ',"restarted":true'
    export __run
    exec -a bash "$BASH" {shlex.join(arguments(rc_path)[1:])} <&{_LINES} 2>/dev/null
}}
trap __left EXIT
exec 2>&1
"""


def command_line(run: int, script: str) -> bytes:
    """Run the script; its answer carries the number.

    What is ours is not heard: no `set -x` traces it, no trap sees it, and it is no failure of its own to `set -e`; so
    the last status is remembered within `eval`, which succeeds. A script that is no whole one ends with its line.
    """
    script = script.replace("\0", "")
    if (len(script) - len(script.rstrip("\\"))) % 2:
        script = script[:-1]  # it would go on with what follows
    quoted = shlex.quote(f"{script}\nif __end $?; then :; fi {_UNHEARD}")
    lines = (
        f'{{ __run={run}; __again && :; }} {_UNHEARD}; eval "$__options"{quoted} </dev/null\n'
        f"__rest $? {_UNHEARD}\n"  # no brace: after an error of syntax it would be none
    )
    return lines.encode("utf-8", "backslashreplace")


def interrupted_line(run: int) -> bytes:
    """Answer for a script that SIGINT has ended."""
    return f"__run={run}; __rest 130 {_UNHEARD}\n".encode()


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
    # Python ignores the first two, and a shell that started us in the background the others; programs would inherit it
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # until the start-up file says so nothing is shown: bash complains that there is no terminal
    null_fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_fd, 2)
    os.close(null_fd)
    os.execvp("bash", arguments(rc_path))
