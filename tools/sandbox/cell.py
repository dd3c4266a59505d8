"""Runs one piece of code the way a notebook cell does. Standard library only."""

import ast
import atexit
import io
import linecache
import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import ModuleType, TracebackType

FILE_NAME = "main.py"


def run_cell(source: str) -> int:
    """Run the code as `__main__`, print the value of a last expression, and return the exit code.

    A traceback, on stderr, shows the code's own frames only. Threads and exit handlers are awaited, as at the end
    of a program. Changes the process for good: call it once, in a process that ends then.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a killed call had printed is kept
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.path.insert(0, os.getcwd())
    sys.argv = [FILE_NAME]
    # without a modification time linecache never looks for the file
    linecache.cache[FILE_NAME] = (len(source), None, source.splitlines(keepends=True), FILE_NAME)
    exit_code = _guard(lambda: _execute(source, main))
    return _guard(_finish) or exit_code


def _guard(step: Callable[[], None]) -> int:
    try:
        step()
    except SystemExit as request:
        if request.code is None or isinstance(request.code, int):
            return (request.code or 0) & 0xFF
        print(request.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - hostile code raises anything; it ends here as in any interpreter
        traceback.print_exception(type(error), error, _own_frames(error.__traceback__))
        return 1
    return 0


def _execute(source: str, main: ModuleType) -> None:
    tree = ast.parse(source, FILE_NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, FILE_NAME, "exec", dont_inherit=True), main.__dict__)
    if last is not None:  # in `single` mode the interpreter prints the value unless it is None
        echo = ast.Interactive([last])
        exec(compile(echo, FILE_NAME, "single", dont_inherit=True), main.__dict__)


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    while trace and trace.tb_frame.f_code.co_filename != FILE_NAME:
        trace = trace.tb_next
    return trace


def _finish() -> None:
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            stream.flush()
