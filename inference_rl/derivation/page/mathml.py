r"""The formulas of the steps as MathML: `mathml`, for the part of LaTeX that they are written in.

Known are the commands in the tables below, `\frac`, `\bar`, `\mathrm`, `\mathbb`, `\mathcal`,
`\operatorname`, `\left` ... `\middle` ... `\right`, `\Big|`, scripts and primes. Anything else is
an error: a formula shows nothing that its author did not mean. MathML spaces relations and
operators itself; thin spaces around functions and fractions are put in as TeX does (The TeXbook,
chapter 18).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element

from inference_rl.html.markup import element

Kind = Literal["ord", "op", "bin", "rel", "open", "close", "punct", "inner", "fenced", "space"]


class Atom(NamedTuple):
    """A part of a formula, and how it stands to its neighbours.

    :ivar limits: whether scripts go below and above it.
    """

    element: Element
    kind: Kind = "ord"
    limits: bool = False


def _pairs(words: str) -> dict[str, str]:
    """Commands, each followed by its character."""
    parts = words.split()
    return dict(zip(parts[::2], parts[1::2], strict=True))


LETTERS = _pairs("""
    alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ kappa κ lambda λ
    mu μ nu ν xi ξ pi π rho ρ sigma σ tau τ phi ϕ varphi φ chi χ psi ψ omega ω ell ℓ
""")
UPRIGHT = _pairs("""
    Gamma Γ Delta Δ Theta Θ Lambda Λ Pi Π Sigma Σ Phi Φ Psi Ψ Omega Ω
    infty ∞ nabla ∇ partial ∂ top ⊤ ldots … cdots ⋯
""")
RELATIONS = _pairs("""
    le ≤ ge ≥ ne ≠ approx ≈ equiv ≡ propto ∝ sim ∼ ll ≪ gg ≫ in ∈ mid ∣ to → mapsto ↦
""")
BINARY = _pairs("cdot ⋅ times × pm ±")
SUMS = _pairs("sum ∑ prod ∏ int ∫")
FUNCTIONS = {"log", "ln", "exp", "tanh", "sin", "cos", "det"}
LIMITED = {"max", "min", "sup", "inf", "lim", "argmax", "argmin"}
"""Functions under which scripts go."""

OPENING = _pairs(r"( ( [ [ \{ { \lvert | \lVert ‖")
CLOSING = _pairs(r") ) ] ] \} } \rvert | \rVert ‖")
BARS = _pairs(r"| | \| ‖")
BIG = "1.8em"
SPACES = {r"\,": 0.167, r"\;": 0.278, r"\ ": 0.25, r"\quad": 1.0, r"\qquad": 2.0}
BLACKBOARD = _pairs("E 𝔼 R ℝ N ℕ P ℙ 1 𝟙")
SCRIPT = _pairs("""
    A 𝒜 B ℬ C 𝒞 D 𝒟 E ℰ F ℱ G 𝒢 H ℋ I ℐ J 𝒥 K 𝒦 L ℒ M ℳ N 𝒩 O 𝒪 P 𝒫 Q 𝒬 R ℛ S 𝒮 T 𝒯 U 𝒰 V 𝒱
    W 𝒲 X 𝒳 Y 𝒴 Z 𝒵
""")

THIN: dict[Kind, tuple[Kind, ...]] = {
    "ord": ("op", "inner"),
    "close": ("op", "inner"),
    "op": ("ord", "op", "inner"),
    "inner": ("ord", "op", "open", "inner", "fenced"),
    "fenced": ("op", "inner"),
}
"""After what a thin space stands, and before what."""

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\S")


def mathml(latex: str) -> Element:
    """A `<math>` element that stands alone on its line.

    :raises ValueError: something in `latex` is not known here, or a group is not closed.
    """
    parser = _Parser(latex)
    content = parser.row(until=None)
    return element("math", *content, display="block")


class _Parser:
    def __init__(self, latex: str) -> None:
        self.latex, self.tokens, self.at = latex, TOKEN.findall(latex), 0

    def error(self, problem: str) -> ValueError:
        return ValueError(
            f"formula {self.latex!r}: {problem}; write it with the commands that are listed in "
            "inference_rl/derivation/page/mathml.py, or add to them"
        )

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if token is None or (expected is not None and token != expected):
            raise self.error(f"expected {expected or 'more'}, got {token or 'its end'}")
        self.at += 1
        return token

    def row(self, until: str | None) -> list[Element]:
        """Atoms up to a token, which is not taken; or all of them."""
        atoms: list[Atom] = []
        while (token := self.peek()) != until:
            if token is None:
                raise self.error(f"expected {until}, got its end")
            atoms.append(self.scripted(self.atom()))
        return _spaced(atoms)

    def group(self) -> Element:
        """What is in braces, or one atom, as one element."""
        if self.peek() != "{":
            return self.atom().element
        self.take("{")
        content = self.row("}")
        self.take("}")
        return content[0] if len(content) == 1 else element("mrow", *content)

    def word(self) -> str:
        """Letters in braces."""
        self.take("{")
        end = self.tokens.index("}", self.at) if "}" in self.tokens[self.at :] else None
        if end is None:
            raise self.error("expected }, got its end")
        letters = "".join(self.tokens[self.at : end])
        self.at = end + 1
        if not re.fullmatch(r"[\w-]+", letters):
            raise self.error(f"expected a word in braces, got {letters!r}")
        return letters

    def scripted(self, base: Atom) -> Atom:
        scripts: dict[str, Element] = {}
        body, primes = base.element, 0
        while (token := self.peek()) in ("_", "^", "'"):
            self.take()
            if token == "'":
                primes += 1
            elif token in scripts:
                raise self.error(f"two scripts {token} on one base")
            else:
                scripts[token] = self.group()
        if primes:  # on the line: as scripts, browsers make them too small
            body = element("mrow", body, element("mo", "′" * primes, lspace="0", rspace="0"))
        if scripts:
            tags = ("under", "over", "underover") if base.limits else ("sub", "sup", "subsup")
            tag = tags[("_" in scripts) + 2 * ("^" in scripts) - 1]
            body = element(f"m{tag}", body, scripts.get("_"), scripts.get("^"))
        return Atom(body, base.kind)

    def atom(self) -> Atom:
        token = self.take()
        if token == "{":
            self.at -= 1
            return Atom(self.group())
        if token in OPENING or token in CLOSING or token in BARS:
            return _delimiter(token)
        if token in SPACES:
            return Atom(element("mspace", width=f"{SPACES[token]:g}em"), "space")
        if token.startswith("\\"):
            return self.command(token[1:])
        return self.character(token)

    def character(self, token: str) -> Atom:
        if token.isdecimal() or re.fullmatch(r"\d+\.\d+", token):
            return Atom(element("mn", token))
        if token.isascii() and token.isalpha():
            return Atom(element("mi", token))
        if token in "+-":
            return Atom(element("mo", {"-": "−"}.get(token, token)), "bin")
        if token in "=<>":
            return Atom(element("mo", token), "rel")
        if token in ",;":
            return Atom(element("mo", token), "punct")
        if token == ":":
            return Atom(element("mo", token), "rel")
        if token in "/.!":
            return Atom(element("mo", token, lspace="0", rspace="0"))
        if token == "*":
            return Atom(element("mo", "∗", lspace="0", rspace="0"))
        raise self.error(f"unexpected {token!r}")

    def command(self, name: str) -> Atom:
        if name in LETTERS:
            return Atom(element("mi", LETTERS[name]))
        if name in UPRIGHT:
            return Atom(element("mi", UPRIGHT[name], mathvariant="normal"))
        if name in RELATIONS:
            return Atom(element("mo", RELATIONS[name], stretchy="false"), "rel")
        if name in BINARY:
            return Atom(element("mo", BINARY[name]), "bin")
        if name in SUMS:
            return Atom(element("mo", SUMS[name]), "op", limits=name != "int")
        if name in FUNCTIONS | LIMITED:
            return _function(name)
        if name == "operatorname":
            return _function(self.word())
        if name == "mathrm":
            return Atom(_upright(self.word()))
        if name in ("mathbb", "mathcal"):
            return Atom(self.letters(BLACKBOARD if name == "mathbb" else SCRIPT, name))
        if name == "bar":  # as an accent it touches the letter in some fonts
            return Atom(element("mover", self.group(), element("mo", "‾", stretchy="false")))
        if name == "frac":
            return Atom(element("mfrac", self.group(), self.group()), "inner")
        if name == "left":
            return self.fenced()
        if name in ("middle", "Big"):
            return self.bar(name)
        raise self.error(f"unknown command \\{name}")

    def letters(self, table: dict[str, str], name: str) -> Element:
        word = self.word()
        if word not in table:
            raise self.error(f"\\{name} has no {word}")
        return element("mi", table[word])

    def fenced(self) -> Atom:
        opening = self.fence("prefix")
        content = self.row(r"\right")
        self.take(r"\right")
        closing = self.fence("postfix")
        # Unlike TeX's, a function stands as close to it as to parentheses that do not grow.
        return Atom(element("mrow", opening, *content, closing), "fenced")

    def fence(self, form: str) -> Element | None:
        """A delimiter that grows with what is beside it; a dot is none."""
        token, known = self.take(), OPENING | CLOSING | BARS
        if token == ".":
            return None
        if token not in known:
            raise self.error(f"expected a delimiter, got {token}")
        return element("mo", known[token], form=form, stretchy="true", fence="true")

    def bar(self, name: str) -> Atom:
        """As tall as the delimiters around it, or of a size of its own."""
        token = self.take()
        if token not in BARS:
            raise self.error(f"expected | or \\| after \\{name}, got {token}")
        size = BIG if name == "Big" else None
        tight = {"lspace": "0", "rspace": "0"}
        mark = element(
            "mo",
            BARS[token],
            stretchy="true",
            symmetric="true",
            minsize=size,
            maxsize=size,
            **tight,
        )
        return Atom(mark, "close" if name == "Big" else "rel")


def _spaced(atoms: list[Atom]) -> list[Element]:
    """The elements, with thin spaces, and signs told from operators."""
    made: list[Element] = []
    before: Kind = "open"
    for atom in atoms:
        kind = atom.kind
        if kind == "bin" and before in ("open", "bin", "rel", "punct", "op"):
            atom.element.set("lspace", "0")
            atom.element.set("rspace", "0")
            kind = "ord"
        if made and kind in THIN.get(before, ()):
            made.append(element("mspace", width="0.167em"))
        made.append(atom.element)
        before = before if kind == "space" else kind
    return made


def _delimiter(token: str) -> Atom:
    if token in BARS:
        return Atom(element("mo", BARS[token], lspace="0", rspace="0", stretchy="false"))
    first = token in OPENING
    form = "prefix" if first else "postfix"
    mark = element("mo", (OPENING | CLOSING)[token], form=form, stretchy="false")
    return Atom(mark, "open" if first else "close")


def _function(name: str) -> Atom:
    """Its name, upright. Where limits go below, it has to be an operator to move them."""
    if name not in LIMITED:
        return Atom(_upright(name), "op")
    words = re.sub("^arg", "arg\N{NO-BREAK SPACE}", name)
    mark = element("mo", words, lspace="0", rspace="0", movablelimits="true")
    return Atom(mark, "op", limits=True)


def _upright(word: str) -> Element:
    return element("mi", word, mathvariant="normal" if len(word) == 1 else None)
