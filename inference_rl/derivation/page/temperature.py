"""What the temperature does: a slider, and curves, policies and numbers that move with it."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from inference_rl.derivation.curves import Curves
from inference_rl.derivation.page import charts
from inference_rl.derivation.page.charts import Curve, frames
from inference_rl.html.charts import decimals, number
from inference_rl.html.markup import element


def temperature_section(curves: Curves) -> Element:
    """The slider, and all that it moves."""
    at = curves.chosen
    plots = [*_plots(curves)]
    last = len(curves.temperatures) - 1
    named = [f"temperature {number(t, 4)}" for t in curves.temperatures]
    shown = [number(temperature, 4) for temperature in curves.temperatures]
    return element(
        "section",
        element("h2", "What the temperature does", id="temperature-title", tabindex="-1"),
        element(
            "p",
            "Exact inference on this model, from a temperature where only reward counts to one "
            "where only the prior does. The dashed line is the value of regular RL.",
            class_="explanation",
        ),
        element(
            "div",
            element("label", "Temperature α ", for_="slider"),
            element(
                "output",
                shown[at],
                for_="slider",
                id="temperature-shown",
                aria_live="off",
                data_frames=frames(text=shown),
            ),
            element(
                "input",
                type="range",
                id="slider",
                min="0",
                max=f"{last}",
                step="1",
                value=f"{at}",
                autocomplete="off",
                aria_valuetext=named[at],
                data_frames=frames(**{"aria-valuetext": named}),
            ),
            element(
                "p",
                _summaries(curves)[at],
                class_="heard",
                aria_live="polite",
                data_frames=frames(text=_summaries(curves)),
            ),
            class_="slider",
        ),
        element("div", *plots, class_="charts"),
        _policies(curves),
        class_="temperature",
        id="temperature",
        aria_labelledby="temperature-title",
    )


def _plots(curves: Curves) -> Iterator[Element]:
    regular = Curve("regular RL", [curves.regular] * len(curves.temperatures), "level")
    yield _figure(
        "Value, reward units",
        curves,
        [
            Curve("J, KL form", curves.objective, "c0"),
            Curve("return, discounted", curves.expected_return, "c2"),
        ],
        regular,
    )
    yield _figure(
        "Value with its entropy, reward units",
        curves,
        [Curve("J, entropy form", curves.objective_entropy_form, "c1")],
        regular,
        powers=True,
    )
    yield _figure(
        "Entropy of the policy, nats a step",
        curves,
        [Curve("entropy", curves.entropy, "c3")],
    )
    if any(gap is not None for gap in curves.evidence_gap):
        yield _figure(
            "Evidence gap, nats",
            curves,
            [Curve("gap, log p(O) − max ELBO", curves.evidence_gap, "c0")],
            powers=True,
            also=[Curve("log p(O)", curves.log_evidence, "unseen")],
        )


def _figure(
    title: str,
    curves: Curves,
    drawn: list[Curve],
    level: Curve | None = None,
    *,
    also: list[Curve] | None = None,
    powers: bool = False,
) -> Element:
    picture = charts.plot(
        title,
        curves.temperatures,
        curves.chosen,
        drawn,
        level=None if level is None else curves.regular,
        powers=powers,
    )
    listed = [*drawn, *([] if level is None else [level]), *(also or [])]
    return element(
        "figure",
        element("figcaption", title),
        picture,
        element("dl", *(_reading(curve, curves.chosen) for curve in listed), class_="legend"),
    )


def _reading(curve: Curve, at: int) -> Element:
    return element(
        "div",
        element(
            "dt",
            element("span", class_=f"swatch {curve.colour}", aria_hidden="true"),
            curve.name,
        ),
        element("dd", _moving(curve, at)),
    )


def _moving(curve: Curve, at: int) -> Element:
    """A number that moves with the slider."""

    def read(value: float | None) -> str:
        if value is None:
            return "not defined"
        return decimals(value, 4) if curve.is_chance else number(value, 5)

    texts = [read(value) for value in curve.values]
    plain = ["" if value is None else repr(value) for value in curve.values]
    moves = frames(text=texts, value=plain) if len(set(plain)) > 1 else None
    return element("data", texts[at], value=plain[at], data_frames=moves)


def _summaries(curves: Curves) -> list[str]:
    """What is said aloud at every temperature."""
    said = []
    for i, temperature in enumerate(curves.temperatures):
        gap = curves.evidence_gap[i]
        words = [
            f"Temperature {number(temperature, 4)}: J {number(curves.objective[i], 4)} in KL form",
            f"{number(curves.objective_entropy_form[i], 4)} in entropy form",
            f"entropy {number(curves.entropy[i], 4)} nats a step",
        ]
        said.append(", ".join([*words, *([] if gap is None else [f"gap {number(gap, 4)} nats"])]))
    return said


def _policies(curves: Curves) -> Element | None:
    if not curves.states:
        return None
    return element(
        "div",
        element("h3", "The policy, at the states that it visits most"),
        element(
            "div", *(_policy(curves, i) for i in range(len(curves.states))), class_="charts small"
        ),
    )


def _policy(curves: Curves, state: int) -> Element:
    """Chances of the actions in one state; of many actions, of those that are ever likely."""
    tables = [table[state] for table in curves.policy]
    kept = list(range(len(curves.actions)))
    if len(kept) > charts.MOST_ACTIONS:
        likely = sorted(kept, key=lambda action: -max(table[action] for table in tables))
        kept = sorted(likely[: charts.MOST_ACTIONS - 1])
    shown = [
        Curve(curves.actions[a], [t[a] for t in tables], f"c{i}", True) for i, a in enumerate(kept)
    ]
    if len(kept) < len(curves.actions):
        rest = [1 - sum(table[action] for action in kept) for table in tables]
        shown.append(Curve("other actions", rest, f"c{len(kept)}", True))
    name = curves.states[state]
    return element(
        "figure",
        element("figcaption", name),
        charts.shares(f"Policy at {name}", curves.temperatures, curves.chosen, shown),
        element("dl", *(_reading(curve, curves.chosen) for curve in shown), class_="legend"),
    )
