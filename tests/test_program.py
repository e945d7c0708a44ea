"""The drawing of the trajectory program shows the dependencies that the program has."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import inference_rl.diagnostics.program as program
from inference_rl import load_target, tabulate

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("no graphviz")

    monkeypatch.setattr("pyro.render_model", missing)


@pytest.mark.usefixtures("without_graphviz")
def test_our_own_drawing(tmp_path: Path) -> None:
    path = program.draw_program(tabulate(load_target("chain")), tmp_path / "p.svg", horizon=2)
    root = ET.parse(path).getroot()
    names = [text.text for text in root.iter(f"{SVG}text")]
    assert sorted(names) == sorted(
        ["state_0", "action_0", "state_1", "O_0", "action_1", "state_2", "O_1"]
    )
    arrows = list(root.iter(f"{SVG}line"))
    assert len(arrows) == 2 * (1 + 2 + 3)  # action; next state; optimality, each step
    filled = [c for c in root.iter(f"{SVG}circle") if c.get("fill") != "white"]
    assert len(filled) == 2


@pytest.mark.usefixtures("without_graphviz")
def test_the_guide_has_no_optimality_and_a_message_adds_one(tmp_path: Path) -> None:
    model = tabulate(load_target("chain"))
    guide = program.draw_program(model, tmp_path / "q.svg", temperature=None).read_text()
    assert "O_" not in guide
    tail = program.draw_program(model, tmp_path / "p.svg", message=lambda s: 0.0 * s)
    assert "O_rest" in tail.read_text()


def test_whoever_draws_it_all_sites_are_there(tmp_path: Path) -> None:
    path = program.draw_program(load_target("pendulum"), tmp_path / "p.svg", horizon=1)
    assert set(re.findall(r">(state_\d|action_\d)<", path.read_text())) == {
        "state_0",
        "action_0",
        "state_1",
    }


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a name that ends in \.svg, got program\.png"):
        program.draw_program(load_target("chain"), "program.png")
