"""A comparison as one HTML file that needs nothing else: `render`."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element

import inference_rl
from inference_rl.diagnostics.comparison.compare import Comparison
from inference_rl.diagnostics.comparison.findings import Cell, Claim, Effect, Table
from inference_rl.diagnostics.comparison.pictures import drawn, strip
from inference_rl.diagnostics.comparison.terminal import (
    cell,
    guide_tables,
    shown_estimate,
)
from inference_rl.html.charts import SUPERSCRIPTS, number
from inference_rl.html.document import contents, entry, header, page
from inference_rl.html.markup import element

MARKS = {
    "holds": ("✓", "pass"),
    "holds in part": ("◐", "does-not-apply"),
    "does not hold": ("✗", "fail"),
    "cannot be told apart": ("≈", "does-not-apply"),
    "does not apply": ("–", "does-not-apply"),
}
"""The sign of a verdict, and the class of its colour."""

HOW_TO_READ = (
    "Every claim is weighed by differences whose sign it predicts. On the strip below a difference "
    "the dot is what was measured, the bar its 95% interval, and the line in the middle is zero, "
    "or what counts as no worse. All of the bar on the right: it holds; all on the left: it does "
    "not hold; across: the two cannot be told apart. What is exact has no bar. Every "
    "interval stands for itself: of twenty differences that are none, one is told apart by chance."
)


def render(comparison: Comparison) -> str:
    """A comparison as a page."""
    return page(
        f"Regular RL beside MaxEnt RL on {comparison.target}",
        element("a", "Skip to the first claim", class_="skip", href="#steps"),
        _header(comparison),
        _contents(comparison),
        element(
            "main",
            element(
                "div",
                element("p", HOW_TO_READ, class_="how"),
                *(_section(i, claim) for i, claim in enumerate(comparison.claims, start=1)),
                _guides(comparison),
                id="steps",
                tabindex="-1",
            ),
        ),
        _footer(comparison),
    )


def _header(comparison: Comparison) -> Element:
    counts = ", ".join(f"{verdict} {count}" for verdict, count in comparison.counts.items())
    policies = "exact" if comparison.exact else f"learned by {', '.join(comparison.learned_by)}"
    facts = {
        "policies": policies,
        "temperatures α": ", ".join(number(t) for t in comparison.temperatures) + " (reward units)",
        "verdicts at": f"α = {number(comparison.reference)}",
        "discount γ": number(comparison.discount),
        "states": comparison.state_space,
        "actions": comparison.action_space,
        "action prior ρ": comparison.prior,
        "learning by": ", ".join(comparison.learned_by),
        "seeds, steps each": f"{comparison.seeds}, {comparison.total_steps:,}",
        "seed": str(comparison.seed),
    }
    lead = (
        "What is said of maximum entropy reinforcement learning, measured on this model. ",
        element("strong", f"Verdicts on {len(comparison.claims)} claims: {counts}."),
    )
    return header(f"Regular RL beside MaxEnt RL on {comparison.target}", lead, facts)


def _contents(comparison: Comparison) -> Element:
    entries = [
        entry(i, claim.title, _badge(claim.verdict, word=False), claim.id)
        for i, claim in enumerate(comparison.claims, start=1)
    ]
    if guide_tables(comparison):
        link = element("a", element("span", ""), element("span", "As guides"), href="#guides")
        entries.append(element("li", link))
    return contents(element("ol", *entries))


def _badge(verdict: str, *, word: bool = True) -> Element:
    mark, colour = MARKS[verdict]
    return element(
        "span",
        element("span", mark, class_="mark", aria_hidden="true"),
        element("span", verdict, class_=None if word else "heard"),
        class_=f"badge {colour}",
    )


def _section(place: int, claim: Claim) -> Element:
    name = f"{claim.id}-title"
    return element(
        "section",
        element(
            "div",
            element(
                "h2",
                element("span", str(place), class_="number"),
                element("a", claim.title, href=f"#{claim.id}"),
                id=name,
                tabindex="-1",
            ),
            _badge(claim.verdict),
            class_="title",
        ),
        element("p", "The claim: ", claim.says, class_="explanation"),
        element("p", claim.measured, class_="words") if claim.measured else None,
        element("p", claim.why, class_="words") if claim.why else None,
        element("div", *map(_effect, claim.effects), class_="numbers") if claim.effects else None,
        element("p", claim.remark, class_="explanation") if claim.remark else None,
        drawn(claim.picture) if claim.picture is not None else None,
        _table(claim.table) if claim.table is not None else None,
        class_="step",
        id=claim.id,
        aria_labelledby=name,
        data_verdict=claim.verdict,
    )


def _guides(comparison: Comparison) -> Element | None:
    parts: list[Element] = []
    for title, says, table in guide_tables(comparison):
        name = {} if parts else {"id": "guides-title", "tabindex": "-1"}
        parts += [
            element("h2", title, **name),
            element("p", says, class_="explanation"),
            _table(table),
        ]
    if not parts:
        return None
    return element("section", *parts, class_="step", id="guides", aria_labelledby="guides-title")


def _effect(effect: Effect) -> Element:
    return element(
        "div",
        element(
            "p",
            _badge(effect.verdict),
            element("span", f"{effect.name[:1].upper()}{effect.name[1:]}"),
            class_="effect-name",
        ),
        strip(effect),
        element(
            "p",
            element(
                "data",
                _for_people(shown_estimate(effect.estimate)),
                value=repr(effect.estimate.value),
            ),
            f" {effect.unit}",
            class_="difference",
        ),
        class_="effect",
    )


def _table(table: Table) -> Element:
    head = element("tr", *(element("th", column, scope="col") for column in table.columns))
    rows = (
        element(
            "tr",
            element("th", _plain(row[0]), scope="row"),
            *(element("td", _plain(value)) for value in row[1:]),
        )
        for row in table.rows
    )
    return element(
        "div",
        element("table", element("thead", head), element("tbody", *rows)),
        class_="wide",
    )


def _plain(value: Cell) -> str:
    return value if isinstance(value, str) else _for_people(cell(value))


def _for_people(numbers: str) -> str:
    """As charts have them: a minus that is one, powers of ten as such."""
    powers = re.sub(
        r"e([+-]\d+)", lambda found: f" × 10{str(int(found[1])).translate(SUPERSCRIPTS)}", numbers
    )
    return powers.replace("-", "−")


def _footer(comparison: Comparison) -> Element:
    return element(
        "footer",
        element(
            "p",
            element("input", type="checkbox", id="keys", checked=True),
            element(
                "label",
                " Keys: ",
                element("kbd", "n"),
                " next claim, ",
                element("kbd", "p"),
                " previous claim",
                for_="keys",
            ),
            class_="screen",
        ),
        element(
            "p",
            f"inference_rl {inference_rl.__version__}, computed in {comparison.seconds:.1f} s. The "
            "same command with this seed gives the same numbers.",
        ),
    )
