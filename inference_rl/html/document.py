"""A page as one HTML file that asks nothing of any network: `page`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from inference_rl.html.markup import Child, element, html

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("script.js")


def page(title: str, *body: Child) -> str:
    """A page of that title, with the style sheet and the script in it."""
    style, script = STYLE.read_text(encoding="utf-8"), SCRIPT.read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    shown = element("body", *body, element("script", script))
    return html(element("html", head, shown, lang="en"))


def header(title: str, lead: Sequence[Child], facts: Mapping[str, str], *notes: str) -> Element:
    """The top of a page: its title, what it is about in a sentence or two, a table of facts.

    The button turns the page dark, or light again.
    """
    return element(
        "header",
        element("button", "Dark", type="button", id="theme", aria_pressed="false"),
        element("p", "Reinforcement learning as probabilistic inference", class_="over"),
        element("h1", title),
        element("p", *lead, class_="lead"),
        element(
            "dl",
            *(
                element("div", element("dt", name), element("dd", value))
                for name, value in facts.items()
            ),
            class_="facts",
        ),
        *(element("p", note) for note in notes),
    )


def contents(*parts: Child) -> Element:
    """The list of what is on a page, which can be folded."""
    return element(
        "nav",
        element("details", element("summary", "Contents"), *parts, open=True),
        aria_label="Contents",
    )


def entry(number: int, title: str, badge: Element, place: str) -> Element:
    """One line of it: what has a number and a verdict, at the id `place`."""
    parts = (element("span", f"{number}", class_="number"), element("span", title), badge)
    return element("li", element("a", *parts, href=f"#{place}"))


def _policy(style: str, script: str) -> str:
    """What the browser is to let a page do: show itself, and run its own script."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )
