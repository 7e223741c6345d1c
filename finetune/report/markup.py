"""HTML that is balanced and escaped by construction: text becomes markup by `element` alone."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from finetune.errors import one_line

VOID = {"img", "meta", "wbr"}


class Markup(str):
    """Text that is HTML already; every other text is escaped."""

    __slots__ = ()


def element(name: str, /, *inside: object, **attributes: object) -> Markup:
    """`element("td", text, class_="wide")`; what is None is left out, of the inside and of the attributes."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{joined([value])}"' for key, value in given.items())
    if name in VOID:
        return Markup(f"<{name}{opening}>")
    return Markup(f"<{name}{opening}>{joined(inside)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """Parts one after the other; a part that is no markup is text."""
    return Markup("".join(x if isinstance(x, Markup) else _escaped(str(x)) for x in parts if x is not None))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str) -> Markup:
    """The first cell of a row names it. It scrolls in a box of its own where it is wider than the page."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = (
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    )
    inside = (element("caption", element("span", caption)), element("thead", top), element("tbody", *body))
    # A box that scrolls is reached with the keyboard too.
    return element("div", element("table", *inside), class_="scroll", tabindex=0, role="region", aria_label=caption)


def facts(pairs: dict[str, object], class_: str | None = None) -> Markup:
    """Names and what they are, those that are known."""
    known = {name: value for name, value in pairs.items() if value not in (None, "")}
    return element("dl", *(element("div", element("dt", n), element("dd", v)) for n, v in known.items()), class_=class_)


def lines(*texts: str) -> Markup:
    """One beneath the other."""
    return element("ul", *(element("li", text) for text in texts), class_="plain")


def figure(title: str, content: object, caption: object, legend: object = None) -> Markup:
    return element("figure", element("h3", title), content, legend, element("figcaption", caption))


def missing(text: str) -> Markup:
    """What is not there, and what gives it."""
    return element("p", text, class_="missing")


def _escaped(text: str) -> str:
    """Whatever a caption or a file's name holds; its lines stay lines."""
    return html.escape("\n".join(map(one_line, text.split("\n"))))
