"""A run's folder: whether its run is alive."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from actors import run_folder
from actors.run_folder import Live, RunFolder
from bus.logins import Logins


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    found = RunFolder("test")
    found.path.mkdir()
    found.write_endpoint(Logins(by_role={}))
    return found


def rewrite(folder: RunFolder, **changes: object) -> None:
    path = folder.path / "endpoint.json"
    live = msgspec.json.decode(path.read_bytes(), type=Live)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(live, **changes)))


def test_a_run_is_alive_as_long_as_its_supervisor(folder: RunFolder) -> None:
    assert folder.live() is not None
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    rewrite(folder, supervisor_pid=ended.pid)
    assert folder.live() is None
    folder.remove_endpoint()
    assert folder.live() is None


def test_another_process_of_that_number_is_not_it(folder: RunFolder) -> None:
    """After a kill and a restart of the machine, or of a container, where each supervisor has the number 1."""
    live = folder.live()
    assert live is not None
    assert live.supervisor_pid == os.getpid()
    rewrite(folder, supervisor_began_s=live.supervisor_began_s - 60.0)
    assert folder.live() is None
