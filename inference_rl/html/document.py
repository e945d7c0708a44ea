"""A page as one HTML file that asks nothing of any network: `page`."""

from __future__ import annotations

import base64
import hashlib
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


def theme_switch() -> Element:
    """The button that turns a page dark, or light again; at the top of its header."""
    return element("button", "Dark", type="button", id="theme", aria_pressed="false")


def _policy(style: str, script: str) -> str:
    """What the browser is to let a page do: show itself, and run its own script."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )
