"""How the `repo` tool edits a file, without a sandbox around it."""

from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import worktree


@given(st.text(alphabet="ab\n", max_size=12), st.text(alphabet="ab\n", max_size=4), st.text())
def test_an_edit_replaces_what_occurs_once(text: str, old: str, new: str) -> None:
    """Overlapping places count, an empty text is nowhere, and whatever is not replaced stays byte for byte."""
    places = [at for at in range(len(text)) if old and text.startswith(old, at)]
    assert list(worktree.occurrences(text, old)) == places
    head, tail = b"\xff\r" + b"c", b"c\x80"
    with TemporaryDirectory() as folder, redirect_stdout(TextIOWrapper(BytesIO(), "utf-8")):
        path = Path(folder, "file")
        path.write_bytes(head + text.encode() + tail)
        if len(places) == 1:
            worktree.edit(str(path), old, new)
            text = text[: places[0]] + new + text[places[0] + len(old) :]
        else:
            with pytest.raises(SystemExit, match="Not edited"):
                worktree.edit(str(path), old, new)
        assert path.read_bytes() == head + text.encode() + tail


def test_lines_may_end_as_on_windows() -> None:
    """The policy writes line feeds, and the file keeps its own."""
    with TemporaryDirectory() as folder, redirect_stdout(TextIOWrapper(BytesIO(), "utf-8")):
        path = Path(folder, "file")
        path.write_bytes(b"a\r\nb\r\nc\r\n")
        worktree.edit(str(path), "a\nb\n", "x\ny\nz\n")
        assert path.read_bytes() == b"x\r\ny\r\nz\r\nc\r\n"
