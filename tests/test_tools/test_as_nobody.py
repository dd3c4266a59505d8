"""The tests of the sandbox once more, as nobody: Landlock refuses root. They end before root's tests start a docker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.sandbox import linux
from tools.sandbox.keeper import LEAST_LANDLOCK_ABI

pytestmark = pytest.mark.slow


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody; this is a user already")
@pytest.mark.timeout(1500)
def test_all_of_it_as_an_ordinary_user() -> None:
    """The same tests, those of `landlock` among them, pass when nobody runs client and server."""
    if (abi := linux.landlock_abi()) < LEAST_LANDLOCK_ABI:
        pytest.skip(f"TIER landlock NOT TESTED HERE: Landlock ABI {abi}")
    names = ("test_attacks.py", "test_tiers.py", "test_sandbox.py", "test_sessions.py")
    files = [str(Path(__file__).with_name(name)) for name in names]
    script = str(Path(__file__).with_name("as_nobody.py"))
    ran = subprocess.run(
        [
            sys.executable,
            script,
            "-rs",
            "--timeout",
            "500",
            "--deselect",
            f"{files[2]}::{_LONG}",
            *files,
        ],
        env={k: v for k, v in os.environ.items() if k not in ("DOCKER_HOST", "PYTEST_ADDOPTS")},
        capture_output=True,
        text=True,
        check=False,
    )
    told = ran.stdout[-20000:] + ran.stderr[-2000:]
    assert ran.returncode == 0, told
    assert "TIER landlock NOT TESTED" not in ran.stdout, told


_LONG = "test_calls_leave_nothing_behind[2000]"
"""It looks for leaks, which are the same for every user."""
