"""The `search` tool: passages of a corpus, found by words (BM25), by meaning (an encoder), or by a remote retriever.

A corpus is a folder: `*.jsonl` with a passage a line (`title`, and `text` or `contents`), and `*.txt`, `*.md`, cut into
passages at blank lines. Both rankings are joined by reciprocal rank fusion (Cormack, Clarke and Büttcher 2009).
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import httpx2
import msgspec
from msgspec import Meta

from tools.errors import ToolError
from tools.function import tool
from tools.tool import Context, Observation, Options, Place

_WORD = r"(?u)\b\w+\b"
_FUSION = 60
"""The constant k of reciprocal rank fusion."""
_FUSED = 100
"""Ranks of each that are fused."""


class SearchOptions(Options, frozen=True):
    """What is searched."""

    corpus: str = ""
    """A folder, relative to the recipe."""
    url: str = ""
    """Of a retriever that answers POST {queries, topk, return_scores}; instead of `corpus`."""
    encoder: str = ""
    """A Hugging Face encoder's folder or hub name; with it, passages are found by meaning too."""
    by: Annotated[str, Meta(pattern="^(auto|words|meaning|both)$")] = "auto"
    """`auto`: both with an encoder, else words."""
    query_prefix: str = ""
    """Written before a query for the encoder, as `query: ` for E5."""
    passage_prefix: str = ""
    passage_chars: Annotated[int, Meta(ge=50)] = 1000
    """Text files are cut into passages of about this length."""
    max_results: Annotated[int, Meta(ge=1)] = 10


class Passage(NamedTuple):
    """What is found."""

    title: str
    text: str


class Retriever(Protocol):
    """Finds passages."""

    async def find(self, query: str, count: int, wall_s: float) -> Sequence[Passage]:
        """The best first. Raises ToolError."""
        ...


@asynccontextmanager
async def open_retriever(options: SearchOptions, place: Place) -> AsyncIterator[Retriever]:
    """The retriever of a recipe; a corpus is read and indexed now. Raises ToolError."""
    if options.url:
        async with httpx2.AsyncClient(trust_env=False) as client:
            yield Remote(client, options.url)
    elif options.corpus:
        yield await asyncio.to_thread(Local, options, place)
    else:
        raise ToolError("no_corpus", "give tools.options.search a `corpus` or a `url`")


@tool(options=SearchOptions, opens=open_retriever, keep="head")
async def search(context: Context, query: str, limit: int = 3) -> Observation:
    """Search the library and return the passages that fit best.

    Args:
        query: What to look for, in words or as a question.
        limit: How many passages to return.
    """
    retriever: Retriever = context.opened
    if not query.strip():
        return Observation(text="The query is empty.", ok=False)
    count = min(max(limit, 1), context.options.max_results)
    found = await retriever.find(query, count, context.limits.wall_s)
    if not found:
        return Observation(text="Nothing was found.")
    texts = [
        f"Doc {number}"
        + (f" (Title: {passage.title})" if passage.title else "")
        + f"\n{passage.text}"
        for number, passage in enumerate(found, 1)
    ]
    return Observation(text="\n\n".join(texts))


class Local:
    """A corpus in memory."""

    def __init__(self, options: SearchOptions, place: Place) -> None:
        """Blocking: reads and indexes all. Raises ToolError."""
        folder = Path(place.recipe_dir, options.corpus)
        self._passages = list(read_corpus(folder, options.passage_chars))
        if not self._passages:
            raise ToolError("no_corpus", f"no *.jsonl, *.txt or *.md in {folder}")
        by = options.by if options.by != "auto" else ("both" if options.encoder else "words")
        texts = [f"{passage.title}\n{passage.text}" for passage in self._passages]
        self._prefix = options.query_prefix
        self._words = _index_words(texts) if by != "meaning" else None
        self._encode = None
        if by != "words":
            if place.encoder is None or not options.encoder:
                raise ToolError("no_encoder", "searching by meaning needs an `encoder`")
            self._encode = place.encoder(options.encoder)
            self._vectors = self._encode([options.passage_prefix + text for text in texts])

    async def find(self, query: str, count: int, wall_s: float) -> Sequence[Passage]:
        """See Retriever. A thread does it, for milliseconds; it cannot be stuck."""
        del wall_s
        return await asyncio.to_thread(self._find, query, count)

    def _find(self, query: str, count: int) -> list[Passage]:
        rankings = []
        depth = count if self._words is None or self._encode is None else _FUSED
        if self._words is not None:
            rankings.append(_by_words(self._words, query, min(depth, len(self._passages))))
        if self._encode is not None:
            (vector,) = self._encode([self._prefix + query])
            scores = self._vectors @ vector
            rankings.append([int(index) for index in (-scores).argsort(kind="stable")[:depth]])
        return [self._passages[index] for index in fuse(rankings)[:count]]


class Remote:
    """A retriever behind a URL, asked as VerlTool and Search-R1 ask theirs."""

    def __init__(self, client: httpx2.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def find(self, query: str, count: int, wall_s: float) -> Sequence[Passage]:
        """See Retriever."""
        asked = {"queries": [query], "topk": count, "return_scores": True}
        try:
            reply = await self._client.post(self._url, json=asked, timeout=wall_s)
            reply.raise_for_status()
            found = msgspec.json.decode(reply.content)["result"][0]
            return [_remote_passage(item) for item in found][:count]
        except httpx2.HTTPError as error:
            raise ToolError("retriever", f"{self._url}: {error!r}") from error
        except (msgspec.DecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ToolError("retriever", f"{self._url} answered in no known shape") from error


def _remote_passage(item: dict[str, Any]) -> Passage:
    """`{"document": {"title"?, "text" | "contents"}, "score"}`, or the document alone."""
    document = item.get("document", item)
    return document_passage(document)


def document_passage(document: dict[str, Any]) -> Passage:
    """A row's title and text; `contents` alone begins with a line that is the title, in quotes. Raises KeyError."""
    text = str(document["text"] if "text" in document else document["contents"])
    title = str(document.get("title") or "")
    first, newline, rest = text.partition("\n")
    if not title and newline and first.startswith('"') and first.endswith('"'):
        title, text = first.strip('"'), rest
    return Passage(title.strip(), text.strip())


def read_corpus(folder: Path, passage_chars: int) -> Iterator[Passage]:
    """Every passage, in the order of the files' names. Raises ToolError for a line that holds none."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _read_line(line, f"{path}:{number}")
        elif path.suffix in (".txt", ".md"):
            text = path.read_text(encoding="utf-8", errors="replace")
            for piece in split_passages(text, passage_chars):
                yield Passage(path.stem, piece)


def _read_line(line: bytes, where: str) -> Passage:
    try:
        return document_passage(msgspec.json.decode(line))
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise ToolError("bad_corpus", f"{where} has neither `text` nor `contents`") from error


def split_passages(text: str, max_chars: int) -> Iterator[str]:
    """Paragraphs, joined while they fit; one that is longer is cut at a space where it has one."""
    passage = ""
    for paragraph in text.split("\n\n"):
        rest = paragraph.strip()
        if passage and len(passage) + 2 + len(rest) > max_chars:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{rest}".strip()
        while len(passage) > max_chars:
            end = passage.rfind(" ", 1, max_chars + 1)
            end = end if end > 0 else max_chars
            yield passage[:end]
            passage = passage[end:].strip()
    if passage:
        yield passage


def fuse(rankings: Sequence[Sequence[int]]) -> list[int]:
    """One ranking of several: each place counts 1 / (60 + rank); of equals, the smaller first."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, index in enumerate(ranking, 1):
            scores[index] = scores.get(index, 0.0) + 1 / (_FUSION + rank)
    return sorted(scores, key=lambda index: (-scores[index], index))


def _index_words(texts: list[str]) -> Any:
    import bm25s

    index = bm25s.BM25()
    tokens = bm25s.tokenize(texts, token_pattern=_WORD, stopwords="english", show_progress=False)
    index.index(tokens, show_progress=False)
    return index


def _by_words(index: Any, query: str, count: int) -> list[int]:
    import bm25s

    (tokens,) = bm25s.tokenize(
        [query], token_pattern=_WORD, stopwords="english", return_ids=False, show_progress=False
    )
    known = [token for token in tokens if token in index.vocab_dict]
    if not known:
        return []
    found, scores = index.retrieve([known], k=count, show_progress=False)
    return [int(i) for i, score in zip(found[0], scores[0], strict=True) if score > 0]
