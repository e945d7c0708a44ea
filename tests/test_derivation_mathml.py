"""Formulas as MathML: each of the ladder's, and how the parts of the language are laid out."""

from __future__ import annotations

import re
from xml.etree.ElementTree import tostring

import pytest

from inference_rl.derivation import STEPS
from inference_rl.derivation.page.mathml import mathml

FORMULAS = [formula for step in STEPS for formula in step.formulas]


def inside(latex: str) -> str:
    return "".join(tostring(part, encoding="unicode") for part in mathml(latex))


def spaces(latex: str) -> list[str]:
    """Text of the parts of a row; a thin space is one."""
    return [" " if part.tag == "mspace" else "".join(part.itertext()) for part in mathml(latex)]


@pytest.mark.parametrize("latex", FORMULAS)
def test_nothing_of_latex_is_left_in_a_formula_of_the_ladder(latex: str) -> None:
    formula = mathml(latex)
    assert formula.get("display") == "block"
    text = "".join(formula.itertext())
    assert text.strip()
    assert not re.search(r"[\\&$^_]", text), text
    for part in formula.iter():
        # Text stands in tokens only, and scripts and fractions have what they need.
        assert bool(part.text) == (part.tag in {"mi", "mo", "mn"})
        assert len(part) == {
            **dict.fromkeys(["msub", "msup", "munder", "mover", "mfrac"], 2),
            **dict.fromkeys(["msubsup", "munderover"], 3),
        }.get(part.tag, len(part))


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"V^*", "<msup><mi>V</mi><mo lspace='0' rspace='0'>∗</mo></msup>"),
        (r"s'", "<mrow><mi>s</mi><mo lspace='0' rspace='0'>′</mo></mrow>"),
        (r"s'_t", "<msub><mrow><mi>s</mi><mo lspace='0' rspace='0'>′</mo></mrow><mi>t</mi></msub>"),
        (r"\mathbb{E}_q^2", "<msubsup><mi>𝔼</mi><mi>q</mi><mn>2</mn></msubsup>"),
        (r"\mathrm{KL}", "<mi>KL</mi>"),
        (r"\mathrm{H}", "<mi mathvariant='normal'>H</mi>"),
        (r"\gamma^{t+1}", "<msup><mi>γ</mi><mrow><mi>t</mi><mo>+</mo><mn>1</mn></mrow></msup>"),
        (r"\frac{1}{2}", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"),
        (r"\sum_a", "<munder><mo>∑</mo><mi>a</mi></munder>"),
        (r"\int_0^1", "<msubsup><mo>∫</mo><mn>0</mn><mn>1</mn></msubsup>"),
        (r"\mathbb{E}_q", "<msub><mi>𝔼</mi><mi>q</mi></msub>"),
        (r"0.95", "<mn>0.95</mn>"),
    ],
)
def test_parts_of_the_language(latex: str, expected: str) -> None:
    assert inside(latex) == expected.replace("'", '"')


def test_a_sign_is_told_from_an_operator() -> None:
    def tight(latex: str) -> list[bool]:
        minuses = (p for p in mathml(latex).iter("mo") if p.text == "−")
        return [part.get("lspace") == "0" for part in minuses]

    assert tight(r"-a") == tight(r"a = -b") == tight(r"(-a)") == tight(r"a = \, -b") == [True]
    assert tight(r"a - b") == tight(r"\left(a\right) - b") == tight(r"(a) - b") == [False]
    assert tight(r"a - -b") == [False, True]


def test_thin_spaces_are_those_of_tex() -> None:
    assert spaces(r"\alpha \log \pi") == ["α", " ", "log", " ", "π"]
    assert spaces(r"\log (x)") == ["log", "(", "x", ")"]
    assert spaces(r"\log \left(x\right) y") == ["log", "(x)", "y"]
    assert spaces(r"a \frac{1}{2} (b)") == ["a", " ", "12", " ", "(", "b", ")"]
    assert spaces(r"Q / \alpha") == ["Q", "/", "α"]


def test_scripts_of_a_maximum_go_below_it() -> None:
    (limit,) = mathml(r"\operatorname{argmax}_a")
    assert limit.tag == "munder"
    assert limit[0].text == "arg\N{NO-BREAK SPACE}max"
    (log,) = mathml(r"\log_2")
    assert log.tag == "msub"


def test_bars_grow_with_what_is_beside_them() -> None:
    fenced = mathml(r"\left( a \,\middle\|\, b \right)")[0]
    assert [part.text for part in fenced if part.get("stretchy") == "true"] == ["(", "‖", ")"]
    (open_ended,) = mathml(r"\left. a \right|")
    assert [part.text for part in open_ended] == ["a", "|"]
    (evaluated,) = mathml(r"\Big|_{a = 0}")
    assert evaluated[0].get("minsize") == evaluated[0].get("maxsize") == "1.8em"


@pytest.mark.parametrize(
    ("latex", "problem"),
    [
        (r"\foo x", r"unknown command \\foo; write it with the commands that are listed in"),
        (r"\frac{1}{2", "expected }, got its end"),
        (r"\left( x", r"expected \\right, got its end"),
        (r"\left a \right)", "expected a delimiter, got a"),
        (r"x^2^3", r"two scripts \^ on one base"),
        (r"a & b", "unexpected '&'"),
        (r"a }", "unexpected '}'"),
        (r"x_", "expected more, got its end"),
        (r"\Big( x", r"expected \| or .* after \\Big, got \("),
        (r"\mathcal{x}", r"\\mathcal has no x"),
        (r"\mathrm{a\,b}", "expected a word in braces"),
        (r"\mathrm{ab", "expected }, got its end"),
        (r"\begin{aligned} a \end{aligned}", r"unknown command \\begin"),
        ("a ≤ b", "unexpected '≤'"),
    ],
)
def test_what_is_not_known_is_an_error(latex: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        mathml(latex)
