"""Runs one piece of code the way a notebook cell does. Standard library only."""

import ast
import atexit
import io
import linecache
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType, TracebackType

FILE_NAME = "main.py"
MOST_FIGURES = 16
"""Of one call, or one cell."""


def run_program(source: str, at_end: Callable[[], None] | None = None) -> int:
    """Run the code as `__main__`, print the value of a last expression, and return the exit code.

    A traceback, on stderr, shows the code's own frames only. Threads and exit handlers are awaited, as at the end
    of a program; `at_end` comes before them. Changes the process for good: call it once, in a process that ends then.
    """
    exit_code = run_cell(source, new_main(), FILE_NAME)
    if at_end:
        exit_code = guard(at_end, FILE_NAME) or exit_code
    return guard(_finish, FILE_NAME) or exit_code


def new_main() -> ModuleType:
    """A fresh `__main__`, in a process that looks as if it had just started."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a killed call had printed is kept
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.path.insert(0, os.getcwd())
    sys.argv = [FILE_NAME]
    return main


def run_cell(source: str, main: ModuleType, file_name: str) -> int:
    """Run the code in the module's names and return the exit code."""
    # without a modification time linecache never looks for the file
    lines = source.splitlines(keepends=True)
    linecache.cache[file_name] = (len(source), None, lines, file_name)
    return guard(lambda: _execute(source, main, file_name), file_name)


def read_file(fd: int) -> bytes:
    """All that is in a file, which is closed then."""
    content = os.read(fd, os.fstat(fd).st_size)
    os.close(fd)
    return content


def guard(step: Callable[[], None], file_name: str) -> int:
    """Take the step; what it raises is shown as an interpreter shows it, and becomes the exit code."""
    try:
        step()
    except SystemExit as request:
        if request.code is None or isinstance(request.code, int):
            return (request.code or 0) & 0xFF
        print(request.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - hostile code raises anything; it ends here as in any interpreter
        traceback.print_exception(type(error), error, _own_frames(error.__traceback__, file_name))
        return 1
    return 0


def _execute(source: str, main: ModuleType, file_name: str) -> None:
    tree = ast.parse(source, file_name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, file_name, "exec", dont_inherit=True), main.__dict__)
    if last is not None:  # in `single` mode the interpreter prints the value unless it is None
        echo = ast.Interactive([last])
        exec(compile(echo, file_name, "single", dont_inherit=True), main.__dict__)


def _own_frames(trace: TracebackType | None, file_name: str) -> TracebackType | None:
    while trace and trace.tb_frame.f_code.co_filename != file_name:
        trace = trace.tb_next
    return trace


def take_figures(limit_bytes: int) -> list[bytes]:
    """The first open matplotlib figures as PNG, while they fit; all are closed. No import where there is none."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    images: list[bytes] = []
    if pyplot is None:
        return images
    for number in pyplot.get_fignums()[:MOST_FIGURES]:
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, format="png")
        limit_bytes -= len(picture.getvalue())
        if limit_bytes < 0:
            break
        images.append(picture.getvalue())
    pyplot.close("all")
    return images


def warm_up() -> None:
    """Touch what every cell uses: in a fork, the first touch of a page copies it."""
    source = "print(end='')"
    _execute(source, ModuleType("__main__"), FILE_NAME)
    source.splitlines(keepends=True)


def flush() -> None:
    """Send what the code has printed on its way."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            stream.flush()


def _finish() -> None:
    if threading := sys.modules.get("threading"):  # it is never imported for its own sake
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    atexit._run_exitfuncs()
    flush()
