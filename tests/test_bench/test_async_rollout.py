"""The comparison with barriers, in small."""

import json
import subprocess
import sys

import pytest

from bench.async_rollout import lockstep_s


def test_lockstep_waits_for_the_slowest_of_each_stage() -> None:
    """A batch takes the sum over its stages of the slowest; one that has ended is waited for no more."""
    assert lockstep_s([[1.0, 5.0], [2.0, 1.0, 3.0]]) == 2.0 + 5.0 + 3.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_small_run_reports_both_modes_and_their_bounds() -> None:
    """The program ends with one JSON line; no mode is faster than its bound allows."""
    command = [sys.executable, "-m", "bench.async_rollout", "--quick", "--in-flight", "4"]
    ran = subprocess.run(
        [*command, "--workloads", "50ms"], capture_output=True, text=True, check=True
    )
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert 0 < figures["sync_of_bound_50ms"] <= 1.0
    assert 0 < figures["async_of_bound_50ms"] <= 1.1  # a window cuts trajectories at its ends
    assert figures["async_per_s_50ms"] > 0
    assert figures["ratio_50ms"] > 0
