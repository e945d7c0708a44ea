"""The page of a comparison in a real browser: Chromium, on the lottery, learned a little."""

from __future__ import annotations

from pathlib import Path

import chromium
import pytest

from inference_rl import load_target
from inference_rl.diagnostics import Comparison, compare
from inference_rl.diagnostics.comparison.page import render

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def lottery() -> Comparison:
    return compare(load_target("lottery"), seeds=2, total_steps=640)


@pytest.fixture(scope="module")
def file(lottery: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "lottery.html"
    path.write_text(render(lottery), encoding="utf-8")
    return path


SEEN = """[...document.querySelectorAll('section.step')].map(step => {
  const size = part => {
    const box = part.getBoundingClientRect();
    return part.checkVisibility() ? [box.width, box.height] : [0, 0];
  };
  return {
    id: step.id,
    verdict: step.dataset.verdict,
    badge: step.querySelector('.title .badge')?.innerText,
    effects: [...step.querySelectorAll('.effect data')].map(read => read.value),
    parts: [...step.querySelectorAll('h2, p, svg, table')].map(size),
    text: step.innerText,
  };
})"""
"""What a reader sees of each section."""


def assert_all_is_there(tab: chromium.Page, lottery: Comparison) -> None:
    seen = tab.run(SEEN)
    assert [part["id"] for part in seen] == [*(claim.id for claim in lottery.claims), "guides"]
    for part, claim in zip(seen, lottery.claims, strict=False):
        assert part["verdict"] == claim.verdict
        assert part["badge"].endswith(claim.verdict)
        assert part["effects"] == [repr(effect.estimate.value) for effect in claim.effects]
        assert claim.title in part["text"]
        assert claim.says in part["text"]
    for part in seen:
        assert all(min(width, height) > 5 for width, height in part["parts"]), part


def test_it_opens_in_silence_and_asks_for_nothing(
    tab: chromium.Page, file: Path, lottery: Comparison
) -> None:
    tab.open(file)
    assert tab.requests == [file.resolve().as_uri()]
    assert tab.messages == []
    assert_all_is_there(tab, lottery)


def test_strips_say_what_the_numbers_do(
    tab: chromium.Page, file: Path, lottery: Comparison
) -> None:
    """A dot is on the side of the line that the difference is on."""
    tab.open(file)
    drawn = tab.run(
        """[...document.querySelectorAll('.effect')].map(effect => {
          const middle = part => {
            const box = part.getBoundingClientRect();
            return (box.left + box.right) / 2;
          };
          const strip = effect.querySelector('svg');
          return middle(strip.querySelector('circle')) - middle(strip);
        })"""
    )
    effects = [effect for claim in lottery.claims for effect in claim.effects]
    assert len(drawn) == len(effects) > 5
    for place, effect in zip(drawn, effects, strict=True):
        beyond = effect.estimate.value - effect.threshold
        assert place * beyond > 0 or abs(place) < 1, effect
    assert max(map(abs, drawn)) > 100


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_can_be_read(tab: chromium.Page, file: Path, dark: bool) -> None:
    """Ink on paper, and back by the button: WCAG's contrast of small text, 4.5."""
    contrasts = """[...document.querySelectorAll('main p, main td, main th, main h2, .badge, dd')]
      .filter(part => part.checkVisibility()).map(part => {
        let paper = part;
        while (getComputedStyle(paper).backgroundColor === 'rgba(0, 0, 0, 0)') {
          paper = paper.parentElement;
        }
        const light = colour => {
          const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
            .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
          return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05;
        };
        const [one, other] = [
          light(getComputedStyle(part).color), light(getComputedStyle(paper).backgroundColor),
        ];
        return Math.max(one, other) / Math.min(one, other);
      })"""
    paper = "getComputedStyle(document.body).backgroundColor"
    papers = ["rgb(255, 255, 255)", "rgb(21, 24, 28)"]
    tab.open(file, dark=dark)
    assert tab.run(paper) == papers[dark]
    assert min(tab.run(contrasts)) >= 4.5
    tab.run("document.getElementById('theme').click()")
    assert tab.run(paper) == papers[not dark]
    assert min(tab.run(contrasts)) >= 4.5
    assert tab.messages == []


def test_a_phone_scrolls_tables_but_not_the_page(
    tab: chromium.Page, file: Path, lottery: Comparison
) -> None:
    tab.open(file, width=360, height=780)
    assert tab.run("document.documentElement.scrollWidth") == 360
    assert tab.beyond() == []
    assert set(tab.run(chromium.SCROLLED)) == {0}
    assert_all_is_there(tab, lottery)


@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_read_without_a_script(
    tab: chromium.Page, file: Path, lottery: Comparison, width: int
) -> None:
    """All but what a script does is there, and what only a script could do is not."""
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(file, width=width, height=780, dark=True)
        assert_all_is_there(tab, lottery)
        assert tab.beyond() == []
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
        assert len(tab.run(LINKS)) == len(lottery.claims) + 1
        for control in ("#theme", "#keys"):
            assert not tab.run(f"document.querySelector('{control}').checkVisibility()"), control
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


LINKS = """[...document.querySelectorAll('nav a')].filter(link =>
  link.checkVisibility() && document.getElementById(link.hash.slice(1))).map(link => link.hash)"""


def test_keys_lead_from_claim_to_claim(tab: chromium.Page, file: Path, lottery: Comparison) -> None:
    tab.open(file)
    ids = [claim.id for claim in lottery.claims]
    for key, place in [("n", 0), ("n", 1), ("n", 2), ("p", 1)]:
        tab.press(key)
        assert tab.run("document.activeElement.closest('section').id") == ids[place]
