"""The process that runs the code of one call or session: it stands by in a world of its own until it is told what.

Standard library only. The job is one packet on `stage`: `{"kind": …, "limits": {…}}` and descriptors:

    call      output, code, stdin[, report]       one piece of code; figures go to `report`, when there is one
    python    output, channel                     cells, as they come on the channel; see session_cells.py
    bash      output, lines, replies              scripts, as they come; see shell.py

The last word on `stage` before any of the code runs is BEGUN, or why it does not: `{"error": …}`. Then `stage` is
closed, so nothing the code does looks like the server's or this module's word.
"""

import _socket
import json
import os
import sys
from typing import Any, NoReturn

from tools.sandbox import linux, shell
from tools.sandbox.cell import read_file, run_program, take_figures, warm_up
from tools.sandbox.session_cells import serve_cells
from tools.sandbox.world import World

PACKET_BYTES = 1 << 16
BEGUN = b"{}"
SETUP_FAILED = 97
_MOST_DESCRIPTORS = 4
_SAMPLE = '{"kind": "call", "limits": {"wall_s": 1.0, "files": 1}}'


def stand_by(stage_fd: int, network_fd: int, world: World, disk_bytes: int) -> NoReturn:
    """Make the world, wait for the job, do it, and end."""
    exit_code = SETUP_FAILED
    # the plain type: Python's own does more, and each step here copies pages
    stage = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, stage_fd)
    try:
        try:
            world.enter(disk_bytes, network_fd, stage_fd)
            warm_up()
            json.loads(_SAMPLE)
            packet, fds = linux.receive_fds(stage, PACKET_BYTES, _MOST_DESCRIPTORS)
            job = json.loads(packet) if packet else None
            if job:
                _become_a_program(job, world, output_fd=fds.pop(0))
                stage.send(BEGUN)
        except OSError as error:
            stage.send(json.dumps({"error": str(error)}).encode())
            job = None
        stage.close()
        if job:
            exit_code = do(job, fds)
    finally:
        os._exit(exit_code)


def _become_a_program(job: dict[str, Any], world: World, output_fd: int) -> None:
    os.setsid()
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    os.close(output_fd)
    limits = job["limits"]
    if job["kind"] == "call":
        world.limit(limits, (limits["cpu_s"], limits["cpu_s"] + 1))
    else:
        world.limit(limits, (limits["session_cpu_s"],) * 2)
    seed_random()


def seed_random() -> None:
    """A fork must not repeat another's numbers."""
    for name in ("random", "numpy.random"):
        if module := sys.modules.get(name):
            module.seed()


def do(job: dict[str, Any], fds: list[int], rc_path: str = shell.RC_PATH) -> int:
    """Do the job with its descriptors but the output, which is there already, and return the exit code."""
    if job["kind"] == "python":
        serve_cells(*fds)
    elif job["kind"] == "bash":
        shell.become(lines_fd=fds[0], replies_fd=fds[1], rc_path=rc_path)
    else:
        return _run_once(job["limits"]["image_bytes"], *fds)
    return 0


def _run_once(image_bytes: int, code_fd: int, stdin_fd: int, report_fd: int | None = None) -> int:
    os.dup2(stdin_fd, 0)
    os.close(stdin_fd)
    source = read_file(code_fd).decode()
    if report_fd is None:
        return run_program(source)

    def report_figures() -> None:
        images = take_figures(image_bytes)
        header = json.dumps({"images": [len(image) for image in images]}).encode()
        with open(report_fd, "wb") as report:
            report.writelines([header, b"\n", *images])

    return run_program(source, report_figures)
