"""A job's own folder, with what hostile code makes of it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.sandbox import scratch
from tools.sandbox.world import most_files

LIMIT_BYTES = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """With a file, a folder and a link to something outside; it is deleted in the end."""
    (tmp_path / "outside").write_bytes(bytes(2 * LIMIT_BYTES))
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_bytes(bytes(1000))
    (path / "link").symlink_to(tmp_path / "outside")
    (path / "to").symlink_to(tmp_path)
    yield path
    scratch.remove(str(path))
    assert os.listdir(tmp_path) == ["outside"]


def full(folder: Path) -> bool:
    return scratch.takes_more_than(LIMIT_BYTES, str(folder), [os.getpid()])


def test_what_is_within_its_limits_is_not_full(folder: Path) -> None:
    """Links are not followed."""
    assert not full(folder)


def test_files_are_counted_wherever_they_are(folder: Path) -> None:
    """Also where the code may not list them itself."""
    hidden = folder / "inner" / "hidden"
    hidden.mkdir()
    (hidden / "file").write_bytes(bytes(2 * LIMIT_BYTES))
    hidden.chmod(0o300)
    assert full(folder)


def test_deleted_files_count_while_they_are_open(folder: Path) -> None:
    with open(folder / "deleted", "wb") as file:
        os.unlink(folder / "deleted")
        file.write(bytes(2 * LIMIT_BYTES))
        file.flush()
        assert full(folder)
    assert not full(folder)


def test_empty_files_count_by_their_number(folder: Path) -> None:
    for number in range(most_files(LIMIT_BYTES)):
        os.mknod(folder / "inner" / str(number))
    assert full(folder)


def test_no_nesting_is_too_deep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is deeper than a path reaches makes it full, and is deleted all the same."""
    monkeypatch.chdir(folder)
    for _ in range(2500):
        os.mkdir("d")
        os.chdir("d")
    Path("deep").touch()
    assert full(folder)
