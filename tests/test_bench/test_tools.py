"""What running code costs, in small."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_figure_is_there() -> None:
    """The program ends with one JSON line that holds what is compared; without a peer its figures are null."""
    command = [sys.executable, "-m", "bench.tools"]
    small = ["--calls", "8", "--sessions", "8", "--slow", "16"]
    ran = subprocess.run([*command, *small], capture_output=True, text=True, check=True)
    figures = json.loads(ran.stdout.splitlines()[-1])
    for name in (
        "python_p50_ms",
        "python_calls_per_s",
        "session_cell_p50_ms",
        "session_idle_mb",
        "noop_calls_per_s",
    ):
        assert figures[name] > 0
    assert figures["slow_calls_s"] > 1.0
    assert figures["peer_python_p50_ms"] is None
    assert figures["peer_python_calls_per_s"] is None
