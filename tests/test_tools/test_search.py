"""The `search` tool: by words, by meaning, by both, and by a remote retriever."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.errors import ToolError
from tools.registry import load_tools, open_tools
from tools.sandbox.sandbox import Limits, Outcome
from tools.search import document_passage, fuse, split_passages
from tools.tool import Context, Observation, Place

PASSAGES = [
    {"id": "1", "title": "Otter", "text": "Otters swim in rivers and eat fish."},
    {"id": "2", "title": "Heron", "text": "A heron stands in shallow water."},
    {"id": "3", "contents": '"Anvil"\nSmiths beat hot iron on it.'},
]


async def no_sandbox(code: str, **_: Any) -> Outcome:
    raise AssertionError("search runs no code")


def letters(texts: list[str]) -> Any:
    """An encoder by letter frequencies: [N, 26], rows of length 1."""
    counts = np.array(
        [[text.lower().count(chr(97 + n)) for n in range(26)] for text in texts], np.float32
    )
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@asynccontextmanager
async def searching(folder: Path, **options: Any) -> AsyncIterator[Callable[..., Any]]:
    (search,) = load_tools(["search"], options={"search": options}).values()

    async def find(query: str, limit: int = 3) -> Observation:
        context = Context(run=no_sandbox, limits=Limits(wall_s=20), task={})
        return await search(context, {"query": query, "limit": limit})

    async with open_tools([search], Place(recipe_dir=str(folder), encoder=lambda _: letters)):
        yield find


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, PASSAGES)) + "\n\n")
    (folder / "deep" / "Newt.md").write_text("Newts are small.\n\nThey live in ponds.\n")
    (folder / "ignored.bin").write_bytes(b"\xff")
    return folder


async def test_the_passage_that_fits_best_comes_first(corpus: Path) -> None:
    """With its title; no more than asked for; nothing that shares no word."""
    async with searching(corpus.parent, corpus="corpus") as find:
        seen = await find("what do otters eat?")
        assert seen == Observation(text="Doc 1 (Title: Otter)\nOtters swim in rivers and eat fish.")
        assert (
            "Doc 1 (Title: Newt)\nNewts are small.\n\nThey live in ponds."
            in (await find("newt ponds")).text
        )
        assert (await find("hot iron")).text == "Doc 1 (Title: Anvil)\nSmiths beat hot iron on it."
        assert (await find("water rivers", limit=1)).text.count("Doc") == 1
        for query in ("zebra", "the", "?!"):
            assert await find(query) == Observation(text="Nothing was found.")
        assert not (await find("  ")).ok


@pytest.mark.parametrize(("by", "first"), [("meaning", "Anvil"), ("both", "Anvil")])
async def test_an_encoder_finds_by_meaning(corpus: Path, by: str, first: str) -> None:
    """Without a word in common; with both, what both find comes first."""
    async with searching(corpus.parent, corpus="corpus", encoder="any", by=by) as find:
        seen = await find("ihtthaonostbinmsiomesiea", limit=1)
        assert seen.text.startswith(f"Doc 1 (Title: {first})")
        assert (await find("herons stand in water", limit=9)).text.count("Doc ") >= 3


@given(st.lists(st.permutations(range(5)).map(lambda order: order[:3]), max_size=3))
def test_fusing_keeps_what_all_agree_on(rankings: list[list[int]]) -> None:
    """Every candidate once; one that is better in each ranking is better in the fused one."""
    fused = fuse(rankings)
    assert sorted(fused) == sorted({index for ranking in rankings for index in ranking})
    if rankings and all(ranking[0] == rankings[0][0] for ranking in rankings):
        assert fused[0] == rankings[0][0]


@given(st.text(st.sampled_from("ab \n")), st.integers(1, 20))
def test_passages_hold_all_of_a_text(text: str, max_chars: int) -> None:
    """None too long, none empty, no word lost."""
    pieces = list(split_passages(text, max_chars))
    assert all(0 < len(piece) <= max_chars for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


@given(st.text())
def test_any_contents_are_a_passage(contents: str) -> None:
    """A first line in quotes is the title."""
    assert document_passage({"contents": f'"T"\n{contents}'}) == ("T", contents.strip())
    assert document_passage({"contents": contents, "title": "U"})[0] == "U"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "a `corpus` or a `url`"),
        ({"corpus": "nowhere"}, "no .*jsonl"),
        ({"corpus": "broken"}, r"x.jsonl:1 has neither"),
        ({"corpus": "corpus", "by": "meaning"}, "needs an `encoder`"),
    ],
)
async def test_a_corpus_that_is_none_is_said_at_once(
    corpus: Path, options: dict[str, Any], says: str
) -> None:
    """When the toolbox begins, not at the first call."""
    (corpus.parent / "broken").mkdir()
    (corpus.parent / "broken" / "x.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ToolError, match=says):
        async with searching(corpus.parent, **options):
            pass


@pytest.mark.parametrize("wrapped", [True, False])
async def test_a_remote_retriever_is_asked(serve: Any, tmp_path: Path, wrapped: bool) -> None:
    """In the shape that VerlTool's users have: queries, topk, return_scores."""

    def answer(asked: Any) -> Any:
        found = [{"document": p, "score": 1.0} for p in PASSAGES] if wrapped else PASSAGES
        return serve.Reply(json.dumps({"result": [found]}).encode(), "application/json")

    site = serve(answer)
    async with searching(tmp_path, url=f"{site.url}/retrieve") as find:
        seen = await find("otters", limit=2)
    assert seen.text.startswith(
        "Doc 1 (Title: Otter)\nOtters swim in rivers and eat fish.\n\nDoc 2"
    )
    assert "Doc 3" not in seen.text
    (asked,) = site.asked
    assert asked.path == "/retrieve"
    assert json.loads(asked.body) == {"queries": ["otters"], "topk": 2, "return_scores": True}


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{}", 200), (b"junk", 200), (b'{"result": [[{"x": 1}]]}', 200), (b"{}", 500)],
)
async def test_a_retriever_that_fails_is_nobodys_query(
    serve: Any, tmp_path: Path, body: bytes, status: int
) -> None:
    """Infrastructure, with the URL; VerlTool shows the policy an empty result instead."""
    site = serve(lambda _: serve.Reply(body, "application/json", status))
    async with searching(tmp_path, url=site.url) as find:
        with pytest.raises(ToolError, match=site.url):
            await find("otters")
