"""What stands in the page of a derivation, and how its pictures are drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference_rl import FiniteModel, load_target
from inference_rl.cli import main
from inference_rl.derivation import Derivation, Step, derive
from inference_rl.derivation.page import render
from inference_rl.derivation.page.charts import (
    Curve,
    equality,
    inequality,
    plot,
    relation,
    slack,
)
from inference_rl.derivation.step import Assumption, Check, Estimate, Row, Side, Twin, evaluate
from inference_rl.derivation.subject import Subject
from inference_rl.diagnostics import page as pictures
from inference_rl.html.charts import LARGE, number, power_axis, value_axis
from inference_rl.html.document import SCRIPT, STYLE
from inference_rl.trajectory import trajectory

VOID = {"meta", "input"}


# ---- what is shown -------------------------------------------------------------------------------


@dataclasses.dataclass
class Shown:
    derivation: Derivation
    html: str


@pytest.fixture(scope="module")
def lake() -> Shown:
    """All steps on FrozenLake, as the command has them."""
    derivation = derive(load_target("FrozenLake-v1"), temperature=0.1, with_curves=True)
    return Shown(derivation, render(derivation))


def small() -> FiniteModel:
    """Two states, the second of which ends."""
    transition = np.array([[[0.5, 0.5], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    reward = np.array([[1.0, 0.0], [0.0, 0.0]])
    end = torch.tensor([False, True])
    return FiniteModel.from_tables(transition, reward, discount=0.9, terminal=end)


def made(left: Any, right: Any, broken: Any, **changes: Any) -> Step:
    """A step whose sides are given."""
    check = Check(
        Side("by one way", lambda _: left),
        Side("by `another`", lambda _: right),
        Twin("a mistake", "right", lambda _: broken, blind=lambda _: "there is nothing to mistake"),
        over=changes.pop("over", ()),
    )
    step = Step(
        id="made",
        title="Made up",
        explanation="It is `so`.",
        formulas=(r"a = b",),
        relation="=",
        unit="reward",
        checks=(check,),
        reference="Levine (2018), arXiv:1805.00909, §3.1",
        about=trajectory,
    )
    return dataclasses.replace(step, **changes)


def page_of(step: Step, **changes: Any) -> str:
    subject = Subject(small(), 1.0)
    derivation = Derivation(
        target="small",
        temperature=1.0,
        discount=0.9,
        horizon=None,
        state_space="Discrete(2)",
        action_space="Discrete(2)",
        prior="uniform",
        seed=0,
        notes=("It is looked at from afar.",),
        findings=(evaluate(step, subject, 1),),
        seconds=0.1,
        curves=None,
    )
    return render(dataclasses.replace(derivation, **changes))


class Reader(HTMLParser):
    """Elements with their attributes, text by class of its element; tags have to be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts += [(attrs.get("class") or tag, data) for tag, attrs in self.open[-1:]]

    def text(self, class_: str) -> list[str]:
        return [text for name, text in self.texts if name == class_]

    def values(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(name)) is not None]


def test_the_page_of_frozen_lake_is_complete_small_and_well_formed(lake: Shown) -> None:
    assert len(lake.html.encode()) < 2_000_000
    assert lake.html.startswith("<!doctype html>")
    read = Reader(lake.html)
    ids = read.values("id")
    assert len(set(ids)) == len(ids)
    named = {value for name in ("for", "aria-labelledby") for value in read.values(name)}
    local = {link[1:] for link in read.values("href") if link.startswith("#")}
    assert named | local <= set(ids)
    shown = plain("".join(text for _, text in read.texts))
    for finding in lake.derivation.findings:
        assert finding.step.id in local
        words = [finding.step.title, finding.step.explanation]
        if finding.comparison is not None:
            words += [finding.left_words, finding.right_words]
        assert all(plain(text) in shown for text in words)
    steps = [attrs for tag, attrs in read.elements if attrs.get("class") == "step"]
    assert [step["id"] for step in steps] == [f.step.id for f in lake.derivation.findings]
    assert [step["data-verdict"] for step in steps] == [f.verdict for f in lake.derivation.findings]


def plain(text: str) -> str:
    """Without what marks code and powers."""
    return re.sub(r"[`^{}\s]", "", text)


def test_the_page_asks_for_nothing(lake: Shown) -> None:
    read = Reader(lake.html)
    assert read.values("src") == read.values("style") == []
    assert {link.partition("/abs/")[0] for link in read.values("href") if link[0] != "#"} <= {
        "https://arxiv.org"
    }
    assert {tag for tag, attrs in read.elements if "href" in attrs} == {"a"}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(", lake.html)
    (policy,) = (c for c in read.values("content") if "default-src" in c)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_what_a_model_is_called_is_text_and_nothing_else() -> None:
    evil = "</title><script>alert(1)</script>\"'&amp;"
    step = made([1.0, 2.0], [1.0, 2.0], 3.0, over=((evil, "b"),), title=evil, explanation=evil)
    read = Reader(page_of(step, target=evil, prior=evil))
    assert len([tag for tag, _ in read.elements if tag == "script"]) == 1
    assert f"The derivation on {evil}" in read.text("h1")
    assert evil in read.text("explanation")


def test_numbers_of_both_sides_and_of_the_twin() -> None:
    step = made([1.0, 2.0], [1.0, 2.0 + 1e-13], [1.0, 2.5], over=(("here", "there"),))
    read = Reader(page_of(step))
    values = [
        attrs["value"]
        for _, attrs in read.elements
        if attrs.get("class") == "value" and "value" in attrs
    ]
    assert values == ["2.0", repr(2.0 + 1e-13), "2.0", "2.5"]
    assert read.text("relation") == ["=", "≠"]
    assert read.text("difference") == [
        *(
            "difference ",
            "−10⁻¹³",
            ", allowed ",
            place := ", in reward units, at there, the worst of 2 places",
        ),
        *("difference ", "−0.5", ", allowed ", place),
    ]
    assert read.text("tolerance") == ["2 × 10⁻¹⁰", "2.5 × 10⁻¹⁰"]
    assert "Broken: a mistake" in read.text("words")
    assert "fail: caught" in read.text("span")


def test_an_inequality_says_its_slack() -> None:
    read = Reader(page_of(made(1.0, 3.0, 0.0, relation="<=")))
    assert read.text("difference")[:2] == ["slack ", "2"]
    assert read.text("relation") == ["≤", ">"]


def test_words_may_have_code_and_powers() -> None:
    read = Reader(page_of(made(1.0, 1.0, 2.0, explanation="`q^2` is not e^{Q/α} nor γ^t.")))
    assert read.text("sup") == ["Q/α", "t"]
    assert "q^2" in read.text("code")


def test_estimates_have_the_digits_that_their_error_leaves() -> None:
    drawn = Estimate(np.array(0.123456789), np.array(0.002))
    read = Reader(page_of(made(drawn, 0.125, 0.5)))
    assert read.text("value")[:3] == ["0.1235", " ± 0.0020", "0.125"]
    coarse = Reader(page_of(made(Estimate(np.array(123456.0), np.array(2345.0)), 1.2e5, 0.5)))
    assert coarse.text("value")[:2] == ["123456", " ± 2.3 × 10³"]


def test_a_step_that_fails_says_where_and_a_twin_that_cannot_differ_says_why() -> None:
    read = Reader(page_of(made(1.0, 2.0, 1.0)))
    assert "fail: both sides differ by 1, allowed 2e-10" in read.text("why as-is")
    assert "cannot differ here" in read.text("span")
    assert "a mistake: cannot differ here: there is nothing to mistake" in read.text("why twin")
    assert "; that fail: 1" in "".join(read.text("strong"))
    assert "Twins that are caught: 0 of 1." in "".join(read.text("strong"))


def test_a_step_that_does_not_apply_has_no_numbers_and_no_switch() -> None:
    never = Assumption("a cat", lambda _: "it has no cat")
    read = Reader(page_of(made(1.0, 1.0, 2.0, assumptions=(never,))))
    assert read.text("why as-is") == ["does not apply: it has no cat"]
    assert "a cat" in read.text("li")
    assert read.text("value") == read.text("switch") == []
    assert "; that do not apply: 1" in "".join(read.text("strong"))


@pytest.mark.parametrize(
    ("model", "pictures", "policies"),
    [("pendulum", 0, 0), ("double-integrator", 3, 0), ("tree", 10, 6)],
)
def test_there_are_as_many_pictures_as_exact_inference_allows(
    model: str, pictures: int, policies: int
) -> None:
    derivation = derive(load_target(model), temperature=1.0, step=1, with_curves=True)
    read = Reader(render(derivation))
    assert len([tag for tag, _ in read.elements if tag == "figure"]) == pictures
    charts = [
        attrs["aria-label"] or "" for _, attrs in read.elements if attrs.get("class") == "chart"
    ]
    assert len([words for words in charts if words.startswith("Policy at")]) == policies
    assert ("slider" in read.values("id")) == (pictures > 0)


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 6, "0"),
        (-1.5, 6, "−1.5"),
        (5.329070518200751e-15, 2, "5.3 × 10⁻¹⁵"),
        (1e-9, 2, "10⁻⁹"),
        (-1e6, 3, "−10⁶"),
        (1234.5678, 12, "1234.5678"),
        (math.inf, 3, "∞"),
        (-math.inf, 3, "−∞"),
        (math.nan, 3, "–"),
        (None, 3, "–"),
    ],
)
def test_numbers_for_people(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text


def row(left: float, right: float, tolerance: float = 1e-9) -> Row:
    return Row("", left, right, left - right, tolerance)


def test_a_difference_stands_on_the_side_of_its_tolerance_where_it_belongs() -> None:
    def at(difference: float, tolerance: float = 1e-9) -> float:
        (dot,) = equality(Row("", 1.0, 1.0, difference, tolerance)).iter("circle")
        return float(dot.get("cx", "").rstrip("%"))

    assert at(1e-9) == pytest.approx(50)
    assert at(-1e-12) < at(1e-10) < 50 < at(1e-8) < at(-1.0) < 100
    assert (at(0.0), at(0.0, 0.0), at(1e30), at(1e-30, 0.0)) == (2, 2, 98, 98)


def test_slack_is_drawn_between_the_sides() -> None:
    picture = inequality(row(1.0, 3.0))
    left, right = (float(c.get("cx", "").rstrip("%")) for c in picture.iter("circle"))
    (slack,) = (r for r in picture.iter("rect") if r.get("class") == "slack")
    assert float(slack.get("x", "").rstrip("%")) == pytest.approx(left, abs=0.02)
    assert float(slack.get("width", "").rstrip("%")) == pytest.approx(right - left, abs=0.02)
    assert "slack 2" in picture.get("aria-label", "")
    turned = inequality(row(3.0, 1.0))
    assert {r.get("class") for r in turned.iter("rect")} == {"line", "excess"}
    assert "too much by 2" in turned.get("aria-label", "")
    assert [line.get("class") for line in inequality(row(-1.0, 1.0)).iter("line")] == ["zero"]
    assert relation(row(-math.inf, 1.0), "<=") is None


def test_slacks_of_a_table_are_drawn_to_one_scale() -> None:
    def drawn(at: Row) -> tuple[str | None, float]:
        (bar,) = slack(at, 4.0)
        return bar.get("class"), float(bar.get("width", "").rstrip("%"))

    assert drawn(row(1.0, 5.0)) == ("slack", 100)
    assert drawn(row(1.0, 2.0)) == ("slack", 25)
    assert drawn(row(2.0, 1.0)) == ("excess", 25)
    assert slack(row(1.0, 1.0), 0.0) is None
    assert slack(row(-math.inf, 1.0), 4.0) is None


def test_axes() -> None:
    assert power_axis([0.001, 0.1, 10.0], LARGE).ticks == (0.001, 0.01, 0.1, 1.0, 10.0)
    assert power_axis([0.002, 0.2, 20.0], LARGE).ticks == (0.01, 0.1, 1.0, 10.0)
    even = value_axis([0.1, 0.54], LARGE, powers=True)
    assert even.ticks == pytest.approx((0.0, 0.2, 0.4, 0.6))
    assert (even.place(0.6), even.place(0.0)) == (LARGE.top, LARGE.bottom)
    powers = value_axis([-0.5, 1.0, 1.0, 3.0, 1000.0], LARGE, powers=True)
    assert powers.ticks == (0.0, 10.0, 1000.0)
    assert (powers.place(1000.0), powers.place(-0.5)) == (LARGE.top, LARGE.bottom)
    spread = [powers.place(1000.0), powers.place(100.0), powers.place(10.0)]
    assert np.diff(spread) == pytest.approx(np.diff(spread).mean(), rel=0.01)
    flat = value_axis([2.0, 2.0], LARGE, powers=False)
    assert LARGE.top < flat.place(2.0) < LARGE.bottom


def test_a_curve_is_broken_where_it_is_not_defined() -> None:
    curve = Curve("gap", [None, 1.0, 2.0, None, 3.0], "c0")
    picture = plot("gap", [0.01, 0.1, 1.0, 10.0, 100.0], 0, [curve])
    (path,) = picture.iter("path")
    assert re.sub(r"[\d.,]+", "", path.get("d", "")).split() == ["M", "L", "M"]
    (dot,) = picture.iter("circle")
    assert dot.get("visibility") == "hidden"
    moves = json.loads(dot.get("data-frames", ""))
    assert moves["visibility"] == ["hidden", "visible", "visible", "hidden", "visible"]


def colours(theme: int) -> dict[str, str]:
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE.read_text())
    return {name: pair[theme] for name, *pair in found}


def contrast(one: str, other: str) -> float:
    """The web's definition, WCAG 2."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return high / low


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_letters_and_lines_can_be_told_from_the_paper(theme: int) -> None:
    known = colours(theme)
    for paper in ("paper", "raised"):
        for ink in ("ink", "muted", "link", "good", "bad"):
            assert contrast(known[ink], known[paper]) >= 4.5, (ink, paper)
        for ink in ("c0", "c1", "c2", "good-fill", "bad-fill"):
            assert contrast(known[ink], known[paper]) >= 3, (ink, paper)


def test_the_page_looks_like_the_pictures_of_a_policy() -> None:
    known = colours(0)
    assert (known["ink"], known["faint"]) == (pictures.INK, pictures.FAINT)
    assert tuple(known[f"c{i}"] for i in range(6)) == pictures.COLOURS


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chain.html"
    main(["derive", "chain", "--step", "16", "--html", str(file), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["html"] == str(file)
    read = Reader(file.read_text(encoding="utf-8"))
    (step,) = (attrs for _, attrs in read.elements if attrs.get("class") == "step")
    assert step["id"] == report["steps"][0]["id"] == "soft-bellman"
    assert {"slider", "temperature"} <= set(read.values("id"))
    assert "chain" in read.text("h1")[0]


@pytest.mark.parametrize("place", [".", "nowhere/page.html"])
def test_a_page_needs_a_directory(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["derive", "chain", "--html", str(tmp_path / place)])
    assert "--html: expected a file in a directory that exists, got" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is full")
def test_a_page_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["derive", "lottery", "--step", "1", "--html", "/dev/full"])
    assert stop.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(r"--html: /dev/full cannot be written \(No space left on device\); name", told)


def test_the_script_computes_no_numbers() -> None:
    assert not re.search(r"toFixed|toPrecision|Math\.(log|exp|pow)", SCRIPT.read_text())
