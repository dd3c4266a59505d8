"""Runs in the sandbox: the work tree of a commit, and what the policy does there. Standard library and git only.

Sent in as source text; see repositories.py. `check_out` comes first; then, in a session, one `act` for each call, which
standard input describes: `{"action": "view", "arguments": {…}}` in one line. What is printed is what the policy sees;
an error of its making ends the cell with exit code 1. Commands of the policy are processes of their own, each with a
pipe of its own for what it prints, so that nothing in the background writes into what comes later.
"""

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

CHECKED_OUT = b"checked out\n"
"""Printed when the work tree is there: what fails before is no fault of the code that follows."""
_FOLDER = "repo"
_LISTED = 200
"""Entries of a folder, and lines of a file where no end is given."""
_READ_BYTES = 4 << 20
_SHOWN_BYTES = 64 << 10
"""Of what a command prints, at its beginning and at its end; also what a pipe holds."""
_AROUND = 4
"""Lines shown before and after an edit."""
_MORE_GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,  # the policy may write one
    "GIT_TERMINAL_PROMPT": "0",
}


def check_out(pack_bytes: int, commit: str) -> None:
    """Make the work tree from the pack that standard input begins with, go there and print CHECKED_OUT."""
    pack = sys.stdin.buffer.read(pack_bytes)
    # where it may not read the system's settings git refuses to run; commands inherit this
    os.environ["GIT_CONFIG_NOSYSTEM"] = "1"
    try:
        os.mkdir(_FOLDER)
        os.chdir(_FOLDER)
        _git("init", "--quiet", "--initial-branch=main")
        _unpack(".git", pack, commit)
        with open(".git/config", "a", encoding="utf-8") as config:
            config.write("[user]\n\tname = agent\n\temail = agent@sandbox\n")
        _git("reset", "--quiet", "--hard", commit)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(_told(error)) from None
    sys.stdout.buffer.write(CHECKED_OUT)
    sys.stdout.buffer.flush()


def act() -> None:
    """Do what standard input says."""
    request = json.loads(sys.stdin.buffer.readline())
    try:
        ACTIONS[request["action"]](**request["arguments"])
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(_told(error)) from None
    finally:
        sys.stdout.flush()


def view(path: str, start: int, end: int) -> None:
    """Show a folder, or lines of a file; `end` 0: as many as are shown at once."""
    if os.path.isdir(path):
        _list(path)
        return
    lines = _lines(_read(path))
    if start < 1 or (start > len(lines) and start > 1) or 0 < end < start:
        raise SystemExit(f"{path} has {len(lines)} lines: there are none from {start} to {end}")
    last = min(end or start + _LISTED - 1, len(lines))
    _show(lines, start, last)
    if start > 1 or last < len(lines):
        print(f"({path} has {len(lines)} lines)")
    elif not lines:
        print(f"({path} is empty)")


def create(path: str, content: str) -> None:
    """Write a new file."""
    if os.path.lexists(path):
        raise SystemExit(f"{path} exists: edit it")
    if folder := os.path.dirname(path):
        os.makedirs(folder, exist_ok=True)
    _write(path, content)
    print(f"Created {path}")


def edit(path: str, old: str, new: str) -> None:
    """Replace a text that occurs once, and show the place."""
    text = _read(path)
    if "\r\n" in text and "\r\n" not in old:
        old, new = old.replace("\n", "\r\n"), new.replace("\n", "\r\n")
    places = list(itertools.islice(occurrences(text, old), 10))
    if not places:
        raise SystemExit(f"Not edited: {path} does not contain `old`. It must match exactly.")
    if len(places) > 1:
        numbers = ", ".join(str(text.count("\n", 0, at) + 1) for at in places)
        raise SystemExit(
            f"Not edited: `old` occurs more than once in {path}, on lines {numbers}. "
            "Add lines around it that make it unique."
        )
    (at,) = places
    text = text[:at] + new + text[at + len(old) :]
    _write(path, text)
    first = text.count("\n", 0, at) + 1
    last = first + new.count("\n")
    print(f"Edited {path}:")
    lines = _lines(text)
    _show(lines, max(1, first - _AROUND), min(len(lines), last + _AROUND))


def occurrences(text: str, part: str) -> Iterator[int]:
    """Where the part begins, overlapping ones too; nowhere if it is empty."""
    at = text.find(part) if part else -1
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def run(command: str) -> None:
    """Run a command in a new shell, show what it prints and end with its exit code."""
    printed = _Printed()
    shell = subprocess.Popen(
        ["bash", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=printed.write_fd,
        stderr=printed.write_fd,
        start_new_session=True,  # an interrupt is for this process, which ends all of it
    )
    try:
        printed.collect_until_end(shell.pid)
    except KeyboardInterrupt:
        os.killpg(shell.pid, signal.SIGKILL)
    exit_code = shell.wait()
    printed.show()
    raise SystemExit(exit_code if exit_code >= 0 else 128 - exit_code)


class _Printed:
    """What a command prints, through a pipe; of much, the beginning and the end."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._collected = bytearray()
        self._left_out = 0
        self._ended = False

    def collect_until_end(self, pid: int) -> None:
        """Collect until the process has ended."""
        os.close(self.write_fd)
        end_fd = os.pidfd_open(pid)
        try:
            while True:
                waited_for = [end_fd] if self._ended else [end_fd, self._read_fd]
                ready, _, _ = select.select(waited_for, [], [])
                if end_fd in ready:
                    return
                self._take()
        finally:
            os.close(end_fd)

    def show(self) -> None:
        """Print what there is; what comes later, from the background, is for nobody."""
        if not self._ended:
            self._take()  # all that a pipe holds
        if self._ended:
            os.close(self._read_fd)
        else:
            threading.Thread(target=self._discard, daemon=True).start()
        if self._left_out:
            note = f"\n[{self._left_out} bytes left out]\n".encode()
            self._collected[_SHOWN_BYTES:_SHOWN_BYTES] = note
        sys.stdout.buffer.write(self._collected)

    def _take(self) -> None:
        """Collect what is there."""
        try:
            chunk = os.read(self._read_fd, _SHOWN_BYTES)
        except BlockingIOError:
            return
        self._ended = not chunk
        self._collected += chunk
        if (more := len(self._collected) - 2 * _SHOWN_BYTES) > 0:
            del self._collected[_SHOWN_BYTES : _SHOWN_BYTES + more]
            self._left_out += more

    def _discard(self) -> None:
        os.set_blocking(self._read_fd, True)
        while os.read(self._read_fd, _SHOWN_BYTES):
            pass
        os.close(self._read_fd)


def hand_in(commit: str, limit_bytes: int) -> None:
    """Print the patch from the commit to the work tree; standard input goes on with the commit's pack.

    What the policy did to `.git` plays no part.
    """
    with tempfile.TemporaryDirectory() as folder:
        _git("init", "--quiet", "--bare", folder)
        _unpack(folder, sys.stdin.buffer.read(), commit)
        apart = (f"--git-dir={folder}", "--work-tree=.")
        _git(*apart, "read-tree", commit)  # tracked is what the commit tracks, ignored or not
        _git(*apart, "add", "--all")
        plain = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
        patch = _git(*apart, "diff", "--cached", *plain, commit)
    if len(patch) > limit_bytes:
        raise SystemExit(
            f"Not submitted: the patch has {len(patch)} bytes, and at most {limit_bytes} can be handed in. "
            "Remove files that do not belong to it."
        )
    sys.stdout.buffer.write(patch)


ACTIONS: dict[str, Callable[..., None]] = {
    "view": view,
    "create": create,
    "edit": edit,
    "run": run,
    "hand_in": hand_in,
}


def _git(*arguments: str, stdin: bytes = b"") -> bytes:
    """What git prints. Raises OSError and CalledProcessError."""
    environment = os.environ | _MORE_GIT
    command = ["git", *arguments]
    return subprocess.run(
        command, input=stdin, env=environment, check=True, capture_output=True
    ).stdout


def _unpack(git_dir: str, pack: bytes, commit: str) -> None:
    _git(f"--git-dir={git_dir}", "index-pack", "--stdin", stdin=pack)
    with open(f"{git_dir}/shallow", "w", encoding="ascii") as shallow:
        shallow.write(f"{commit}\n")


def _told(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"git: {error.stderr.decode(errors='replace').strip()}"
    if error.filename in ("git", "bash"):
        return f"there is no {error.filename} in the sandbox, and the tool `repo` needs it: install it there"
    return f"{error.strerror}: {error.filename}"


def _read(path: str) -> str:
    """The file's text; bytes that are no UTF-8 are kept for `_write`."""
    size = os.stat(path).st_size
    if size > _READ_BYTES:
        raise SystemExit(f"{path} has {size} bytes, too many to show: use a command")
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    if "\0" in text:
        raise SystemExit(f"{path} is a binary file")
    return text


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _show(lines: Sequence[str], first: int, last: int) -> None:
    numbered = [f"{number:6}\t{lines[number - 1]}\n" for number in range(first, last + 1)]
    _say("".join(numbered))


def _say(text: str) -> None:
    """Print text that may have bytes in it that are no UTF-8."""
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))


def _list(path: str) -> None:
    """The folder and those in it, without what is hidden."""
    entries: list[str] = []
    for folder, folders, files in os.walk(path):
        names = [f"{name}/" for name in folders] + files
        entries += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        if folder == path:
            folders[:] = [name for name in folders if not name.startswith(".")]
        else:
            folders.clear()
    shown = [entry.removeprefix("./") for entry in sorted(entries)[:_LISTED]]
    _say("".join(f"{entry}\n" for entry in shown) or f"({path} is empty)\n")
    sys.stdout.buffer.flush()
    if len(entries) > _LISTED:
        print(f"({len(entries) - _LISTED} more)")
