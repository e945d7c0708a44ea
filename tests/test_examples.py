"""Every example runs and asserts what it claims, and their README tells of all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from inference_rl.derivation import STEPS

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("[0-9]*.py"))
README = (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert not ran.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_and_asserts(example: Path) -> None:
    text = example.read_text()
    assert len(text.splitlines()) <= 120
    assert re.search(r"^ *assert ", text, flags=re.MULTILINE)


def test_the_readme_links_them_in_order() -> None:
    assert re.findall(r"^\d\. \[.*\]\((.*)\)", README, flags=re.MULTILINE) == [
        example.name for example in EXAMPLES
    ]


def formulas() -> str:
    """What the README has to list: the formulas of every step, and what of the library has them."""
    lines = []
    for number, step in enumerate(STEPS, start=1):
        home = f"{step.about.__module__.replace('.', '/')}.py"
        assert (FOLDER.parent / home).exists()
        lines.append(f"**{number}. {step.title}**: [`{step.about.__qualname__}`](../{home})\n")
        lines += [f"```math\n{formula}\n```\n" for formula in step.formulas]
    return "\n".join(lines)


def test_the_readme_lists_every_formula() -> None:
    expected = formulas()
    assert expected in README, f"expected in examples/README.md:\n{expected}"
