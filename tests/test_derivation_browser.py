"""The page of a derivation in a real browser: Chromium, on FrozenLake with every step."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import chromium
import pytest

from inference_rl import load_target
from inference_rl.derivation import Derivation, derive
from inference_rl.derivation.curves import Curves
from inference_rl.derivation.page import render
from inference_rl.html.charts import number

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason="needs Chromium")


@dataclasses.dataclass
class Shown:
    derivation: Derivation
    curves: Curves


@pytest.fixture(scope="module")
def lake() -> Shown:
    """All steps, as the command has them."""
    derivation = derive(load_target("FrozenLake-v1"), temperature=0.1, with_curves=True)
    assert derivation.curves is not None
    return Shown(derivation, derivation.curves)


@pytest.fixture(scope="module")
def file(lake: Shown, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "lake.html"
    path.write_text(render(lake.derivation), encoding="utf-8")
    return path


def test_it_opens_in_silence_and_asks_for_nothing(tab: chromium.Page, file: Path) -> None:
    tab.open(file)
    tab.run("document.querySelectorAll('details').forEach(box => box.open = true)")
    assert tab.requests == [file.resolve().as_uri()]
    assert tab.messages == []


def test_formulas_are_laid_out(tab: chromium.Page, file: Path, lake: Shown) -> None:
    tab.open(file)
    laid = tab.run(
        """[...document.querySelectorAll('math')].map(formula => {
          const box = formula.getBoundingClientRect();
          const parts = [...formula.querySelectorAll('mi, mn, mo, mfrac')]
            .filter(part => part.textContent.trim())
            .map(part => part.getBoundingClientRect());
          return {
            width: box.width,
            height: box.height,
            text: formula.textContent,
            flat: parts.filter(part => !(part.width > 0 && part.height > 0)).length,
            outside: parts.filter(part =>
              part.right > box.right + 1 || part.left < box.left - 1).length,
            stacked: [...formula.querySelectorAll('mfrac')].every(f =>
              f.children[0].getBoundingClientRect().bottom <=
              f.children[1].getBoundingClientRect().top + 1),
          };
        })"""
    )
    assert len(laid) == sum(len(finding.step.formulas) for finding in lake.derivation.findings)
    for formula in laid:
        assert min(formula["width"] / 20, formula["height"] / 10) > 1, formula
        assert formula["flat"] == formula["outside"] == 0, formula
        assert formula["stacked"], formula
        assert not re.search(r"[\\&$]", formula["text"]), formula


READINGS = """[...document.querySelectorAll('.temperature figure')].map(figure => [
  figure.querySelector('figcaption').textContent,
  ...[...figure.querySelectorAll('.legend data')].map(read => [read.value, read.textContent]),
])"""
MARKERS = """[...document.querySelectorAll('.marker')].map(line =>
  line.getBoundingClientRect().left - line.closest('svg').getBoundingClientRect().left)"""


def expected(moved: Curves, at: int) -> list[list[float | None]]:
    """What stands under every picture at a temperature."""
    figures: list[list[float | None]] = [
        [moved.objective[at], moved.expected_return[at], moved.regular],
        [moved.objective_entropy_form[at], moved.regular],
        [moved.entropy[at]],
        [moved.evidence_gap[at], moved.log_evidence[at]],
    ]
    return figures + [list(chances) for chances in moved.policy[at]]


def test_the_slider_shows_what_was_computed(tab: chromium.Page, file: Path, lake: Shown) -> None:
    tab.open(file)
    tab.run("document.getElementById('slider').focus()")
    last = len(lake.curves.temperatures) - 1
    at = lake.curves.chosen
    seen = []
    moves = [
        ("ArrowRight", 1),
        ("ArrowUp", 1),
        ("ArrowLeft", -1),
        ("Home", -last),
        ("ArrowRight", 1),
    ]
    for key, by in [(None, 0), *moves, ("End", last), ("ArrowLeft", -1)]:
        if key is not None:
            tab.press(key)
        at = min(max(at + by, 0), last)
        figures = tab.run(READINGS)
        assert len(figures) == len(expected(lake.curves, at))
        for (title, *read), numbers in zip(figures, expected(lake.curves, at), strict=True):
            assert [float(value) for value, _ in read] == numbers, title
            for (_, text), exact in zip(read, numbers, strict=True):
                assert float(as_plain(text)) == pytest.approx(exact, rel=1e-4, abs=6e-5)
        temperature = lake.curves.temperatures[at]
        shown = tab.run("document.getElementById('temperature-shown').textContent")
        assert float(as_plain(shown)) == pytest.approx(temperature, rel=1e-3)
        said = tab.run("document.querySelector('.slider [aria-live=polite]').textContent")
        assert said.startswith(f"Temperature {shown}: J {number(lake.curves.objective[at], 4)}")
        told = tab.run("document.getElementById('slider').getAttribute('aria-valuetext')")
        assert told == f"temperature {shown}"
        seen.append((at, tab.run(MARKERS)))
    for (one, before), (other, after) in itertools.pairwise(seen):
        assert all(
            math.copysign(1, b - a) == math.copysign(1, other - one)
            for a, b in zip(before, after, strict=True)
        )


def as_plain(text: str) -> str:
    """A number for people, as Python reads it."""
    powers = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")
    mantissa, times, power = text.partition("10⁻" if "10⁻" in text else " × 10")
    if not times:
        return text.translate(powers)
    if times == "10⁻":
        return (
            f"{(mantissa.removesuffix(' × ') or '1').translate(powers)}e-{power.translate(powers)}"
        )
    return f"{mantissa.translate(powers)}e{power.translate(powers)}"


def plain(text: str) -> str:
    """Without what marks code and powers."""
    return re.sub(r"[`^{}\s]", "", text)


VISIBLE = """(() => {
  const seen = [...document.querySelectorAll('section.step')].map(step => {
    const shown = [...step.querySelectorAll('.numbers')].filter(box => box.checkVisibility());
    return [step.id, {
      sides: shown.map(box => [...box.querySelectorAll('.sides data')].map(read => read.value)),
      differences: shown.map(box => box.querySelector('data.difference').value),
      words: shown.map(box => box.textContent),
      badges: [...step.querySelectorAll('.title .badge')].filter(b => b.checkVisibility())
        .map(b => b.textContent.slice(1)),
    }];
  });
  return Object.fromEntries(seen);
})()"""


def test_breaking_a_step_shows_its_twin(tab: chromium.Page, file: Path, lake: Shown) -> None:
    tab.open(file)
    whole = tab.run(VISIBLE)
    for finding in lake.derivation.findings:
        if finding.comparison is not None:
            seen = whole[finding.step.id]
            assert seen["sides"] == [[repr(finding.left), repr(finding.right)]]
            assert [abs(float(x)) for x in seen["differences"]] == [abs(finding.difference or 0.0)]
            assert seen["badges"] == [finding.verdict]
    switches = tab.run("document.querySelectorAll('.break').length")
    assert switches == lake.derivation.counts["twins"] > 0
    tab.run("document.querySelectorAll('.break').forEach(box => { box.focus(); box.click() })")
    broken = tab.run(VISIBLE)
    for finding in lake.derivation.findings:
        twin = finding.twin
        if twin is None or twin.comparison is None:
            continue
        worst, seen = twin.comparison.worst, broken[finding.step.id]
        assert seen["sides"] == [[repr(worst.left), repr(worst.right)]]
        assert [abs(float(x)) for x in seen["differences"]] == [abs(worst.difference)]
        assert plain(f"Broken: {twin.words}") in plain(seen["words"][0])
        assert seen["badges"] == [
            "fail: caught" if twin.verdict == "fail" else "cannot differ here"
        ]
    assert tab.run("getComputedStyle(document.querySelector('.break')).display") != "none"
    tab.press(" ")  # the last one has the focus
    mended = Counter(part["badges"][0] for part in tab.run(VISIBLE).values())
    assert mended["fail: caught"] == lake.derivation.counts["twins_caught"] - 1


def test_keys_lead_from_step_to_step(tab: chromium.Page, file: Path, lake: Shown) -> None:
    tab.open(file)
    ids = [finding.step.id for finding in lake.derivation.findings]
    keys = [("n", 0), ("j", 1), ("n", 2), ("p", 1), ("k", 0), ("p", 0)]
    for key, step in keys + [("n", min(i + 1, len(ids) - 1)) for i in range(len(ids))]:
        tab.press(key)
        assert tab.run("document.activeElement.closest('section').id") == ids[step]
        assert 0 <= tab.run("document.activeElement.getBoundingClientRect().top") < 900
    marked = "new Promise(then => requestAnimationFrame(() => requestAnimationFrame(then)))"
    marked += ".then(() => document.querySelector('nav [aria-current]').hash)"
    assert tab.run(marked) == f"#{ids[-1]}"
    box = "document.querySelector('nav [aria-current]').getBoundingClientRect()"
    assert 0 < tab.run(f"{box}.top") < tab.run(f"{box}.bottom") < 900


def test_every_control_is_reached_and_seen_to_be(
    tab: chromium.Page, file: Path, lake: Shown
) -> None:
    tab.open(file)
    controls = tab.run("[...document.querySelectorAll('button, input')].map(part => part.id)")
    assert len(controls) == 3 + lake.derivation.counts["twins"]
    reached = []
    for _ in range(600):
        tab.press("Tab")
        place = "[document.activeElement.tagName, document.activeElement.id]"
        tag, name = tab.run(place)
        if tag == "BODY":
            break
        reached.append(name or tag)
        assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert set(controls) <= set(reached)
    tab.open(file)
    tab.press("Tab")
    tab.press("Enter")
    assert tab.run("location.hash") == "#steps"
    tab.press("Tab")
    first = lake.derivation.findings[0].step.id
    assert tab.run("document.activeElement.closest('section').id") == first


def test_keys_can_be_switched_off_and_break_the_step_that_is_read(
    tab: chromium.Page, file: Path, lake: Shown
) -> None:
    tab.open(file)
    first = next(f.step.id for f in lake.derivation.findings if f.twin is not None)
    tab.run(f"document.getElementById('{first}').querySelector('h2').focus()")
    tab.press("b")
    assert tab.run(f"document.getElementById('{first}-break').checked")
    tab.run("document.getElementById('keys').click()")
    tab.press("b")
    assert tab.run(f"document.getElementById('{first}-break').checked")


def test_dark_and_light(tab: chromium.Page, file: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    pressed = "document.getElementById('theme').getAttribute('aria-pressed')"
    tab.open(file, dark=True)
    dark = tab.run(paper)
    assert tab.run(pressed) == "true"
    tab.run("document.getElementById('theme').click()")
    light = tab.run(paper)
    assert tab.run(pressed) == "false"
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)")
    tab.open(file)
    assert tab.run(paper) == light


def test_a_phone_scrolls_formulas_and_tables_but_not_the_page(
    tab: chromium.Page, file: Path
) -> None:
    tab.open(file, width=360, height=780)
    tab.run("document.querySelectorAll('.break').forEach(box => box.click())")
    tab.run("document.querySelectorAll('main details').forEach(box => box.open = true)")
    tab.run("dispatchEvent(new Event('resize'))")
    assert tab.beyond() == []
    assert set(tab.run(chromium.SCROLLED)) == {0}


def test_paper_has_every_step_open_and_whole(
    tab: chromium.Page, file: Path, tmp_path: Path
) -> None:
    tab.open(file)
    tab.run("document.querySelectorAll('.break').forEach(box => box.click())")
    tab.run("""addEventListener('beforeprint', () => {
      window.paper = [...document.querySelectorAll('main details')].every(box => box.open);
    })""")
    tab.printed(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert tab.run("window.paper")
    assert not tab.run("document.querySelector('main details').open")
    tab.call("Emulation.setEmulatedMedia", media="print")
    for control in ("#theme", "#slider", ".switch", "#keys", ".numbers.twin"):
        assert not tab.run(f"document.querySelector('{control}').checkVisibility()"), control
    assert tab.run("document.querySelector('.numbers.as-is').checkVisibility()")
    tab.call("Emulation.setEmulatedMedia", media="")
