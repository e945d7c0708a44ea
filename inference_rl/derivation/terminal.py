"""A derivation as text: every step in its order, with the numbers of this model."""

from __future__ import annotations

import re
import textwrap

from rich.console import Console
from rich.text import Text

from inference_rl.derivation.ladder import Derivation
from inference_rl.derivation.step import Finding, Row, Step

WIDTH = 100
"""Columns, or fewer where the terminal has no more."""

INDENT = 4

STYLES = {"pass": "green", "fail": "bold red", "does not apply": "yellow"}

GREEK = {
    "alpha": "α",
    "gamma": "γ",
    "rho": "ρ",
    "pi": "π",
    "tau": "τ",
    "eta": "η",
    "mu": "μ",
    "sigma": "σ",
    "varepsilon": "ε",
    "theta": "θ",
}
SIGNS = {
    "sum": "Σ",
    "prod": "Π",
    "nabla": "∇",
    "infty": "∞",
    "partial": "∂",
    "le": "≤",
    "ge": "≥",
    "cdot": "·",
    "cdots": "…",
    "sim": "~",
    "propto": "∝",
    "to": "→",
    "mid": "|",
    "|": "‖",
    "equiv": "≡",
    "qquad": "   ",
    "quad": "  ",
    ",": " ",
    ";": " ",
    " ": " ",
    "{": "{",
    "}": "}",
    "left": "",
    "right": "",
    "middle": "",
    "Big": "",
}


def print_derivation(
    derivation: Derivation, *, only_failed: bool = False, console: Console | None = None
) -> None:
    """Print a derivation, or what of it failed."""
    console = console or Console()
    width = min(WIDTH, console.width)
    for line in heading(derivation, width):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for finding in derivation.findings:
        if finding.verdict == "fail" or not only_failed:
            console.print()
            for text in lines(finding, width):
                console.print(text, soft_wrap=True)
    if only_failed and not derivation.failed:
        console.print("No step failed.", highlight=False)


def heading(derivation: Derivation, width: int) -> list[str]:
    """What was derived, and how many steps came to what."""
    counts = derivation.counts
    horizon = "" if derivation.horizon is None else f", horizon {derivation.horizon}"
    head = [
        f"Derivation of {derivation.target} at temperature {derivation.temperature:g} (reward "
        f"units), discount {derivation.discount:g}{horizon}, seed {derivation.seed}",
        f"{counts['pass']} of {counts['steps']} steps pass, {counts['fail']} fail, "
        f"{counts['does_not_apply']} do not apply; {counts['twins_caught']} of {counts['twins']} "
        f"broken twins were caught; {derivation.seconds:.1f} s",
        *derivation.notes,
    ]
    return [part for line in head for part in textwrap.wrap(line, width)]


def lines(finding: Finding, width: int) -> list[Text]:
    """A step as lines of at most `width` columns."""
    step, found = finding.step, finding.comparison
    room = width - len(finding.verdict) - 1
    title, *rest = textwrap.wrap(f"{finding.number:>2}. {step.title}", room, drop_whitespace=False)
    first = Text(title.ljust(room + 1), style="bold")
    first.append(finding.verdict, style=STYLES[finding.verdict])
    shown = [first, *(Text(line, style="bold") for line in rest)]
    shown += _wrapped(step.explanation, width)
    for formula in step.formulas:
        shown += _wrapped(plain(formula), width, INDENT + 2, style="cyan")
    if finding.why:
        label = "does not apply: " if found is None and finding.verdict != "fail" else ""
        style = STYLES[finding.verdict]
        shown += _wrapped(f"{label}{finding.why}", width, style=style)
    if found is not None:
        worst = found.worst
        if found.places > 1:
            shown += _wrapped(f"{found.places:,} places; at {worst.place}:", width)
        shown += _side("left", worst.left, worst.left_error, finding.left_words, width)
        shown += _side("right", worst.right, worst.right_error, finding.right_words, width)
        shown += _wrapped(_relation(step, worst), width)
    if finding.twin is not None:
        shown += _wrapped(_twin(finding), width)
    source = f"{finding.source.file}:{finding.source.line}"
    shown += _wrapped(f"{step.reference}. {source}", width, style="dim")
    return shown


def _side(name: str, value: float, error: float | None, words: str, width: int) -> list[Text]:
    spread = "" if error is None else f" ± {error:.2g}"
    head = f"{name:<6}{value:.6g}{spread}  "
    return _wrapped(head + words, width, hanging=6)


def _relation(step: Step, worst: Row) -> str:
    unit = f" {step.unit}" if step.unit else ""
    allowed = f"(tolerance {worst.tolerance:.2g})"
    if step.relation == "=":
        return f"=     they differ by {abs(worst.difference):.2g}{unit} {allowed}"
    if worst.difference <= 0:
        return f"≤     with {-worst.difference:.3g}{unit} to spare {allowed}"
    return f"≤     missed by {worst.difference:.3g}{unit} {allowed}"


def _twin(finding: Finding) -> str:
    twin = finding.twin
    assert twin is not None
    said = {"fail": "caught", "pass": "NOT caught"}.get(twin.verdict, twin.verdict)
    at = ""
    if twin.comparison is not None:
        worst = twin.comparison.worst
        value = worst.left if twin.replaces == "left" else worst.right
        at = f", which makes the {twin.replaces} {value:.6g}, off by {abs(worst.difference):.3g}"
        at += f" at {worst.place}" if worst.place else ""
    return f"twin  {said}: {twin.words}{at if twin.verdict in ('fail', 'pass') else ''}"


def _wrapped(
    text: str, width: int, indent: int = INDENT, *, style: str = "", hanging: int = 0
) -> list[Text]:
    found = textwrap.wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hanging),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [Text(line, style=style) for line in found]


def plain(latex: str) -> str:
    """A formula as a line of text: what LaTeX of it is used here, in Unicode.

    :raises ValueError: it uses more.
    """
    text = re.sub(r"\\(?:mathrm|operatorname|mathcal|mathbb)\{([^{}]*)\}", r"\1", latex)
    text = text.replace("^*", "*")
    special = re.compile(r"(\\log\s*)?\\frac\s*(?=\{)|([_^])(?=\{)")
    while (found := special.search(text)) is not None:
        inside, rest = _group(text, found.end())
        if found[2]:
            script = plain(inside)
            shown = found[2] + (script if re.fullmatch(r"\w+['*]?", script) else f"({script})")
        else:
            below, rest = _group(text, rest)
            shown = f"{_atom(plain(inside))}/{_atom(plain(below))}"
            shown = f"{found[1]}({shown})" if found[1] else shown
        text = text[: found.start()] + shown + text[rest:]
    # The name of a function ends where no letter follows, which may take a space.
    text = re.sub(r"\\(log|max|min|lim|tanh|bar)(?![a-z])", r"\1 ", text)
    text = re.sub(r"\\([a-zA-Z]+|[|,; {}])", _sign, text)
    text = re.sub(r"bar\s+r", "r̄", text)
    for pattern, shorter in ((r"\s+", " "), (r" (?=[,)\]_])", ""), (r"(?<=[(\[]) ", "")):
        text = re.sub(pattern, shorter, text)
    text = re.sub(r"\b(log|tanh) \(", r"\1(", text)
    if "\\" in text:
        raise ValueError(f"formula: expected LaTeX that is known here, got {latex}")
    return text.strip()


def _sign(match: re.Match[str]) -> str:
    name = match[1]
    return GREEK[name] if name in GREEK else SIGNS.get(name, match[0])


def _group(text: str, start: int) -> tuple[str, int]:
    """What stands in the braces that open at `start`, and where they have closed."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + 1 : at], at + 1
    raise ValueError(f"formula: expected braces that close, got {text}")


def _atom(text: str) -> str:
    """In parentheses, unless it is one symbol or one call."""
    simple = re.fullmatch(r"[\w∂|]+['*]?([_^][\w∂]+['*]?)*(\([^()]*\))?", text)
    return text if simple else f"({text})"
