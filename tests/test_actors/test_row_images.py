"""Images of a data row's messages: how they are written, what the log has of them, and what is refused."""

import asyncio
import base64
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.data import read_rows
from actors.dispatching import Dispatching
from actors.errors import RecipeError
from actors.heartbeat import Vitals
from actors.images import load_image
from actors.process import Process
from actors.row_images import images_of, load_row_image, without_parts
from bus import subjects
from bus.connection import Bus
from bus.log import Log
from schemas.names import find
from schemas.recipe import Data, Policy, Recipe
from schemas.task import TaskRow
from tools.tool import Image

SEEING = str(Path(__file__).parents[1] / "seeing")
picture: Callable[..., bytes] = find("seeing:picture", SEEING)


def row(*contents: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content} for content in contents]
    return {"id": "a", "public": {"messages": messages}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(picture("red"))
    return tmp_path


def rows_of(folder: Path, *rows: dict[str, Any]) -> list[TaskRow]:
    (folder / "t.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return read_rows("t.jsonl", "data.path", str(folder))


def load_all(folder: Path, *contents: Any) -> list[Image]:
    """The images of a row."""
    (read,) = rows_of(folder, row(*contents))
    return [load_row_image(image, str(folder)) for image in images_of(read)]


def test_every_way_of_giving_an_image(folder: Path) -> None:
    """A path, a data: URI, base64; each is the same file, at its place in the text."""
    encoded = base64.b64encode(picture("red")).decode()
    uri = f"data:image/png;base64,{encoded}"
    parts = [
        {"type": "text", "text": "First "},
        {"type": "image", "image": "red.png"},
        {"type": "image", "path": "red.png", "url": None},
        {"type": "text", "text": " then "},
        {"type": "image", "image": uri},
        {"type": "image", "url": uri},
        {"type": "image", "base64": encoded},
    ]
    (read,) = rows_of(folder, row("no image", parts))
    assert [message.content for message in read.public.messages] == [
        "no image",
        "First <image><image> then <image><image><image>",
    ]
    assert [image.message for image in images_of(read)] == [1] * 5
    loaded = [load_row_image(image, str(folder)) for image in images_of(read)]
    assert {(image.data, image.media_type) for image in loaded} == {(picture("red"), "image/png")}


def test_images_in_parquet(folder: Path) -> None:
    """Bytes, and as the library `datasets` writes them; a content is a list of parts throughout."""
    parts = [
        {"type": "text", "text": "Which? "},
        {"type": "image", "image": {"bytes": picture("red"), "path": None}},
        {"type": "image", "image": {"bytes": None, "path": "red.png"}},
    ]
    table = pa.Table.from_pylist([row(parts, [{"type": "text", "text": "Say."}])])
    pyarrow.parquet.write_table(table, folder / "t.parquet")
    (read,) = read_rows("t.parquet", "data.path", str(folder))
    assert [each.content for each in read.public.messages] == ["Which? <image><image>", "Say."]
    loaded = [load_row_image(image, str(folder)).data for image in images_of(read)]
    assert loaded == [picture("red")] * 2


def dispatching(bus: Bus, log: Log, folder: Path) -> Dispatching:
    """A dispatcher of tasks in a file, that takes version 0 to be there."""
    recipe = Recipe(policy=Policy(model="m"), data=Data(path="t.jsonl"))
    vitals = Vitals(run=log.run, role="dispatcher", replica="dispatcher-h-1")
    joined = Dispatching(Process(bus, log, recipe, str(folder), vitals, asyncio.Event()))
    joined._policy_version = 0
    return joined


async def test_what_is_admitted_has_hashes(folder: Path, bus: Bus, log: Log) -> None:
    """Each image where it stands, and the store has it; all members of a group have the same."""
    image = {"type": "image", "path": "red.png"}
    rows_of(folder, row([image], "?", [{"type": "text", "text": "and "}, image]))
    joined = dispatching(bus, log, folder)
    served = asyncio.create_task(joined.serve())
    subject = subjects.trajectory(log.run, "*", "admitted")
    async for found in log.follow(subject=subject):
        if found:
            break
    joined._process.stopping.set()
    await served
    events = [stored.event async for stored in log.read(subject)]
    assert {event.trajectory for event in events} >= {f"g0-{member}-0" for member in range(8)}
    for event in events:
        messages = event.public.messages
        assert [each.content for each in messages] == ["<image>", "?", "and <image>"]
        assert [len(message.images) for message in messages] == [1, 0, 1]
        stored = messages[2].images[0]
        assert (stored.width, stored.height, stored.media_type) == (8, 8, "image/png")
    assert (await load_image(bus, log.run, stored)).data == picture("red")


async def test_a_broken_image_ends_the_dispatcher(folder: Path, bus: Bus, log: Log) -> None:
    """With the row's name, not with a group of exceptions: it is no use to begin it again."""
    (folder / "cut.png").write_bytes(picture("red", 64, 64)[:-40])
    rows_of(folder, row([{"type": "image", "path": "cut.png"}]))
    async with asyncio.timeout(60):
        with pytest.raises(RecipeError, match=r"t\.jsonl row 1: .*cut\.png: a broken image"):
            await dispatching(bus, log, folder).serve()


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            {"type": "image", "path": "blue.png"},
            "public.messages[0].content[1]: no file 'blue.png'",
        ),
        ({"type": "image", "path": "t.jsonl"}, "t.jsonl: no image of a known format"),
        ({"type": "image", "path": "cut.png"}, "content[1]: cut.png: a broken image: "),
        ({"type": "image", "base64": "?"}, "content[1]: data:;base64,?: "),
        ({"type": "image"}, "content[1]: an image needs one of image, path, url, base64"),
        ({"type": "image", "path": "red.png", "base64": "aa"}, "an image needs one of"),
        ({"type": "image", "image": 3}, "a path, a data: URI or bytes, not int"),
        ({"type": "image", "url": "https://a.b/c.png"}, "content[1].url: nothing is fetched"),
        ({"type": "image", "file": "red.png"}, "`file` - at `$.public.messages[0].content[1]`"),
        ({"type": "video"}, "'video' - at `$.public.messages[0].content[1].type`"),
        ({"type": "text", "text": "an <image>"}, "content[1].text: <image> stands where an image"),
        ("red.png", "Expected `object`, got `str` - at `$.public.messages[0].content[1]`"),
    ],
)
def test_a_bad_image_is_named(folder: Path, part: Any, says: str) -> None:
    """By file, row and part: whatever is wrong with it."""
    (folder / "cut.png").write_bytes(picture("red", 64, 64)[:-40])
    with pytest.raises(RecipeError) as caught:
        load_all(folder, [{"type": "image", "path": "red.png"}, part])
    message = str(caught.value)
    assert message.startswith(f"{folder}/t.jsonl row 1: ")
    assert says in message
    assert "\n" not in message


def test_hashes_are_not_given_by_rows(folder: Path) -> None:
    """They would name what nobody has stored."""
    bad = {"id": "a", "public": {"messages": [{"role": "user", "content": "?", "images": []}]}}
    with pytest.raises(RecipeError, match=r"messages\[0\]\.images: give an image as a part"):
        rows_of(folder, bad)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "image", "path", "url", "base64", "content", "role"]),
            inner | st.sampled_from(["image", "text"]),
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(_JSON)
def test_any_messages_are_read_or_refused(messages: Any) -> None:
    """As a user error; a row without parts stays as it is."""
    row = {"id": "a", "public": {"messages": messages}}
    with suppress(RecipeError):
        read, _ = without_parts(row, "here", "")
        if isinstance(messages, list):
            given = [each for each in read["public"]["messages"] if isinstance(each, dict)]
            assert not any(isinstance(message.get("content"), list) for message in given)
