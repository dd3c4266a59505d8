"""Web pages as text, blocking: runs in the children of tools/workers.py."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

_META = re.compile(rb"""<meta[^>]+charset=["']?\s*([\w-]+)""", re.IGNORECASE)
_META_BYTES = 4096
_CLUTTER = (
    *("script", "style", "noscript", "template", "svg", "iframe", "canvas", "object", "form"),
    *("nav", "aside", "footer", "button", "dialog"),
)
_BLOCKS = {
    *("address", "article", "blockquote", "body", "dd", "details", "div", "dl", "dt", "figcaption"),
    *("figure", "header", "hr", "li", "main", "ol", "p", "pre", "section", "summary", "table"),
    *("tbody", "thead", "tr", "ul", "h1", "h2", "h3", "h4", "h5", "h6"),
}
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}


def read_page(data: bytes, media_type: str, charset: str, url: str) -> dict[str, str]:
    """`title` and `text` of a page; the text is its main part, in Markdown's manner, with links made absolute."""
    if media_type not in ("text/html", "application/xhtml+xml"):
        return {"title": "", "text": _decode(data, charset).strip()}
    from selectolax.lexbor import LexborHTMLParser

    if not charset and (found := _META.search(data[:_META_BYTES])):
        charset = found[1].decode()
    tree = LexborHTMLParser(_decode(data, charset))
    title = tree.css_first("title")
    for clutter in _CLUTTER:
        for node in tree.css(clutter):
            node.decompose()
    main = tree.css_first("main") or tree.css_first("article") or tree.body
    text = "".join(_pieces(main, url)) if main else ""
    return {
        "title": " ".join(title.text().split()) if title else "",
        "text": _tidy(text),
    }


def _decode(data: bytes, charset: str) -> str:
    try:
        text = data.decode(charset or "utf-8", errors="replace")
    except (LookupError, ValueError):  # no such charset, or one that replaces nothing, like "idna"
        text = data.decode(errors="replace")
    return text.encode(errors="replace").decode()  # some charsets, like utf-7, hold lone surrogates


def _pieces(root: Any, url: str) -> Iterator[str]:
    """The text with line breaks and marks; a stack and no recursion: pages may be nested without limit."""
    stack: list[Any | str] = [root]
    pre_depth = 0
    new_line = True
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            pre_depth -= node == "</pre>"
            piece = "\n\n" if node == "</pre>" else node
        elif node.tag == "-text":
            text = node.text_content or ""
            piece = text if pre_depth else re.sub(r"\s+", " ", text)
            piece = piece.lstrip(" ") if new_line and not pre_depth else piece
        else:
            piece = ""
        if piece:
            new_line = piece.endswith("\n")
            yield piece
        if isinstance(node, str) or node.tag == "-text":
            continue
        tag = node.tag
        before, after = _around(node, tag, url)
        pre_depth += tag == "pre"
        if before:
            new_line = before.endswith("\n")
            yield before
        stack.append("</pre>" if tag == "pre" else after)
        children = list(node.iter(include_text=True))
        stack.extend(reversed(children))


def _around(node: Any, tag: str, url: str) -> tuple[str, str]:
    """What comes before and after an element's text."""
    if tag in _HEADINGS:
        return f"\n\n{_HEADINGS[tag]} ", "\n\n"
    if tag == "a":
        link = _absolute(url, _attribute(node, "href"))
        return ("[", f"]({link})") if link.startswith(("http://", "https://")) else ("", "")
    if tag == "img":
        text = _attribute(node, "alt")
        return (f"[image: {text}]" if text else ""), ""
    if tag == "pre":
        return "\n\n", ""  # its end is marked otherwise
    if tag == "li":
        return "\n- ", ""
    if tag in ("td", "th"):
        return " | ", ""
    if tag in ("br", "tr"):
        return "\n", ""
    return ("\n\n", "\n\n") if tag in _BLOCKS else ("", "")


_LINK_CHARS = 2000


def _absolute(url: str, link: str) -> str:
    """Where a link leads; empty if nowhere."""
    try:
        found = urljoin(url, link.strip()) if link else ""
        # a page has many, and each takes in the page's own
        return found if len(found) <= _LINK_CHARS else ""
    except ValueError:  # "http://[domain]/"
        return ""


def _attribute(node: Any, name: str) -> str:
    return (node.attributes or {}).get(name) or ""


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
