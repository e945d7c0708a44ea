"""The page as a whole: `render`."""

from __future__ import annotations

from xml.etree.ElementTree import Element

import inference_rl
from inference_rl.derivation.ladder import Derivation
from inference_rl.derivation.page.step import badge, section
from inference_rl.derivation.page.temperature import temperature_section
from inference_rl.html.charts import number
from inference_rl.html.document import contents, entry, header, page
from inference_rl.html.markup import Child, element

HOW_TO_READ = (
    "Under the formulas of a step stand both sides as they come out on this model. The bar below "
    "an equation has powers of ten: the dot is the difference of its sides, and the line in the "
    "middle is what rounding may do, or chance where something was drawn. Below an inequality both "
    "sides are dots, and the slack between them is green. “Break it” puts the twin in place of "
    "what is right."
)

KEYS = {"n": "next step", "p": "previous step", "b": "break the step, or mend it"}


def render(derivation: Derivation) -> str:
    """A derivation as a page, with a slider over temperature where it has curves."""
    return page(
        f"The derivation on {derivation.target}",
        element("a", "Skip to the first step", class_="skip", href="#steps"),
        _header(derivation),
        _contents(derivation),
        element(
            "main",
            None if derivation.curves is None else temperature_section(derivation.curves),
            element(
                "div",
                element("p", HOW_TO_READ, class_="how"),
                *(section(finding) for finding in derivation.findings),
                id="steps",
                tabindex="-1",
            ),
        ),
        _footer(derivation),
    )


# ---- around the steps ----------------------------------------------------------------------------


def _header(derivation: Derivation) -> Element:
    counts = derivation.counts
    failed, skipped = counts["fail"], counts["does_not_apply"]
    words = f"Steps that hold on this model: {counts['pass']} of {counts['steps']}"
    words += f"; that fail: {failed}" if failed else ""
    words += f"; that do not apply: {skipped}" if skipped else ""
    words += f". Twins that are caught: {counts['twins_caught']} of {counts['twins']}."
    steps = "1 step" if derivation.horizon == 1 else f"{derivation.horizon} steps"
    facts = {
        "temperature α": f"{number(derivation.temperature)} (reward units)",
        "discount γ": number(derivation.discount),
        "horizon": "none" if derivation.horizon is None else steps,
        "states": derivation.state_space,
        "actions": derivation.action_space,
        "action prior ρ": derivation.prior,
        "seed": str(derivation.seed),
    }
    lead = (
        "From one decision to the algorithms, step by step. Every equation is computed on "
        "this model in two ways, written apart, and beside it a ",
        element("em", "broken twin"),
        ": the same with one mistake in it, which has to be found. ",
        element("strong", words),
    )
    return header(f"The derivation on {derivation.target}", lead, facts, *derivation.notes)


def _contents(derivation: Derivation) -> Element:
    temperature = element("li", element("a", "What the temperature does", href="#temperature"))
    entries = [
        entry(found.number, found.step.title, badge(found.verdict, word=False), found.step.id)
        for found in derivation.findings
    ]
    return contents(
        None if derivation.curves is None else element("ul", temperature),
        element("ol", *entries),
    )


def _footer(derivation: Derivation) -> Element:
    listed: list[Child] = []
    for key, words in KEYS.items():
        listed += [", " if listed else " Keys: ", element("kbd", key), f" {words}"]
    return element(
        "footer",
        element(
            "p",
            element("input", type="checkbox", id="keys", checked=True),
            element("label", *listed, for_="keys"),
            class_="screen",
        ),
        element(
            "p",
            f"inference_rl {inference_rl.__version__}, computed in {derivation.seconds:.1f} s. "
            "Files are named from the root of the project.",
        ),
    )
