"""System calls made in one go: what they do, and how one that fails is told."""

import errno
import os
from pathlib import Path

import pytest

from tools.sandbox.batch import Batch


@pytest.fixture(params=["machine code", "Python"])
def slowly(request: pytest.FixtureRequest) -> bool:
    """Whether Python makes the calls, as on machines for which there is no code."""
    return request.param == "Python"


def prepared(batch: Batch, slowly: bool) -> Batch:
    batch.prepare()
    if slowly:
        batch._run = batch._run_slowly
    return batch


def test_calls_are_made_in_order_and_results_are_passed_on(tmp_path: Path, slowly: bool) -> None:
    """A file is opened, and what is written goes to its descriptor."""
    before = set(os.listdir("/proc/self/fd"))
    paths = [tmp_path / name for name in ("one", "two")]
    batch = Batch()
    for path in paths:
        path.touch()
        batch.write_file(str(path), f"in {path.name}")
    prepared(batch, slowly).run()
    assert [path.read_text() for path in paths] == ["in one", "in two"]
    for fd in set(os.listdir("/proc/self/fd")) - before:
        if os.path.exists(f"/proc/self/fd/{fd}"):
            os.close(int(fd))


def test_the_first_call_that_fails_is_the_last_and_is_told(tmp_path: Path, slowly: bool) -> None:
    """By its name and the kernel's error; what would come after it is not done."""
    kept = tmp_path / "kept"
    kept.write_text("kept")
    batch = Batch()
    place = batch.add("chdir", str(tmp_path / "missing").encode())
    batch.write_file(str(kept), "lost")
    prepared(batch, slowly)
    with pytest.raises(OSError, match=r"chdir: No such file") as caught:
        batch.run()
    assert caught.value.errno == errno.ENOENT
    assert kept.read_text() == "kept"
    assert place == 0


def test_an_argument_can_be_changed(slowly: bool) -> None:
    """Descriptors are known late."""
    read_fd, write_fd = os.pipe()
    batch = Batch()
    place = batch.add("write", -1, b"said", 4)
    prepared(batch, slowly)
    batch.set(place, 0, write_fd)
    batch.run()
    assert os.read(read_fd, 9) == b"said"
    os.close(read_fd)
    os.close(write_fd)
